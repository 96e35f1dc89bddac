"""Records survive crashes, a resumed run repeats none of them, and progress reads well anywhere."""

import json

import pytest

from wsparse import metrics
from wsparse.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def write_records(workdir, *steps, tail=""):
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps]
    (workdir / "metrics.jsonl").write_text("".join(lines) + tail)


def steps_of(workdir):
    return [record["step"] for record in metrics.read(workdir)]


def test_a_folder_without_records_reads_as_none(tmp_path):
    assert metrics.read(tmp_path) == []


def test_records_come_back_as_they_were_written(tmp_path):
    values = {"loss": 2.5, "per_matrix": {"a/b": [1, 2], "c": [3]}, "alive": [4, 5]}
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, values)
        # Each record is on disk as soon as it is written: a crash loses none.
        assert metrics.read(tmp_path) == [{"step": 1, **values}]
        writer.write(2, {"loss": 2.0})
    assert steps_of(tmp_path) == [1, 2]
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    for name in (b"loss", b"per_matrix/a/b/0", b"per_matrix/c/0", b"alive/1"):
        assert name in content
    assert b"per_matrix/a/b/2" not in content


def test_numbers_that_are_not_finite_reach_the_file_but_not_the_events(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"exploded": float("nan"), "fine": 1.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"fine" in events.read_bytes()
    assert b"exploded" not in events.read_bytes()
    # JSON has no NaN.
    assert metrics.read(tmp_path) == [{"step": 1, "exploded": None, "fine": 1.0}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_last_record_of_a_step_is_one_with_a_finite_number(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 1.0})
        for value in (2.0, 3.0, float("nan")):
            writer.write(2, {"loss": value})
        writer.write(2, {"other": 4.0})
    assert metrics.last_record(tmp_path, 2, "loss") == {"step": 2, "loss": 3.0}
    assert metrics.last_record(tmp_path, 1, "other") is None
    assert metrics.last_record(tmp_path / "missing", 1, "loss") is None


@pytest.mark.parametrize(
    ("start", "kept"), [(0, []), (4, []), (5, [5]), (12, [5, 10]), (15, [5, 10, 15]), (99, [5, 10, 15])]
)
def test_resuming_removes_exactly_the_records_after_the_checkpoint(tmp_path, start, kept):
    write_records(tmp_path, 5, 10, 15)
    metrics.MetricsWriter(tmp_path, start).__exit__()
    assert steps_of(tmp_path) == kept


def test_a_resumed_writer_goes_on_where_the_checkpoint_was(tmp_path):
    write_records(tmp_path, 5, 10, 15, tail='{"step": 20, "lo')
    with metrics.MetricsWriter(tmp_path, 12) as writer:
        writer.write(15, {"loss": 9.0})
    assert steps_of(tmp_path) == [5, 10, 15]
    assert metrics.read(tmp_path)[-1] == {"step": 15, "loss": 9.0}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_last_line_cut_short_is_left_out(tmp_path, cut):
    write_records(tmp_path, 5, 10, tail=json.dumps({"step": 15, "loss": 0.1})[:cut])
    assert steps_of(tmp_path) == [5, 10]


def test_a_whole_last_line_without_a_line_end_is_kept(tmp_path):
    """Negative control of the test above: only what cannot be read is left out."""
    write_records(tmp_path, 5, 10, tail=json.dumps({"step": 15, "loss": 0.1}))
    assert steps_of(tmp_path) == [5, 10, 15]


def test_a_corrupted_line_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    write_records(tmp_path, 5, 10, 15)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-4], lines[2]]) + "\n")
    with pytest.raises(UserError) as error:
        metrics.read(tmp_path)
    assert f"{path}:2:" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["null", "[1]", "12", '{"loss": 1.0}', '{"step": "5"}', "[" * 200_000])
def test_a_line_that_is_not_a_record_is_an_error_that_names_it(tmp_path, line):
    write_records(tmp_path, 5, tail=f"{line}\n" + json.dumps({"step": 10}) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a record"):
        metrics.read(tmp_path)


def test_records_that_are_set_aside_overwrite_none(tmp_path):
    for step in (5, 10):
        write_records(tmp_path, step)
        metrics.set_aside(tmp_path, tmp_path / "damaged")
        assert not (tmp_path / "metrics.jsonl").exists()
    metrics.set_aside(tmp_path, tmp_path / "damaged")
    contents = [json.loads(p.read_text())["step"] for p in sorted((tmp_path / "damaged").iterdir())]
    assert contents == [5, 10]


def test_what_is_not_finite_is_null_in_strict_json():
    values = {"a": [1.0, float("inf")], "b": {"c": float("nan")}, "d": (2, "x")}
    assert metrics.strict(values) == {"a": [1.0, None], "b": {"c": None}, "d": [2, "x"]}


def test_curves_are_drawn_from_records(tmp_path):
    records = [{"step": s, "tokens": 64 * s, "loss": 5.0 / s, "nonzeros": 1000 // s} for s in range(1, 20)]
    records.insert(10, {"step": 10, "tokens": 640, "val_loss": 0.6})
    path = tmp_path / "curves.png"
    metrics.plot_curves(records, path)
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 1000
    metrics.plot_curves(records[:12], path)
    assert path.read_bytes() != content, "the picture must depend on the records"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png"]

"""Recipes compile for TPU slices on any machine, and what is said of a program is what it does."""

import dataclasses
import json
import math
import re
import types

from absl import flags
from helpers import REPO, run_python
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from wsparse import aot, hlo, model, recipes, sharding
from wsparse.config import MeshConfig, TrainConfig, from_dict
from wsparse.errors import UserError
from wsparse.ops import selection
from wsparse.step import init_state, make_program

RECIPES = [name for name in recipes.names() if name.startswith("gao:")]

CONFIG = from_dict(
    TrainConfig,
    {
        "model": {"vocab_size": 256, "context": 128, "n_layer": 3, "d_model": 128, "n_head": 8,
                  "compute_dtype": "bfloat16"},
        "sparsity": {"density": 0.1},
        "mesh": {"data": 2, "fsdp": 2},
        "batch_size": 8,
    },
)  # fmt: skip


# Reading programs -------------------------------------------------------------------------------------

# A scan over four layers, as the TPU compiler writes it, shortened.
LOOP = (REPO / "tests" / "loop.hlo").read_text()


def test_a_scan_counts_as_often_as_it_runs_and_one_channel_is_one_collective():
    program = hlo.parse(LOOP)
    assert program.matmul_flops() == 4 * 2 * 8 * 128 * 128
    (gather,) = program.collectives()
    assert gather == hlo.Collective("all-gather", 4, 4 * 128 * 128, 4, False)


@pytest.mark.parametrize(("step", "iterations"), [(2, 2), (3, 2)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_counter_that_takes_larger_steps_makes_fewer_iterations(step, iterations, fused):
    text = LOOP.replace("%one = s32[]{:T(128)} constant(1)", f"%one = s32[] constant({step})")
    if not fused:
        whole = "fusion(%i), kind=kLoop, calls=%add_one"
        assert whole in text
        text = text.replace(whole, "add(%i, %more)").replace(
            "  %i = s32", f"  %more = s32[] constant({step})\n  %i = s32"
        )
    program = hlo.parse(text)
    assert program.matmul_flops() == iterations * 2 * 8 * 128 * 128
    assert [each.count for each in program.collectives()] == [iterations]


@pytest.mark.parametrize(("start", "iterations"), [(0, 4), (1, 3), (3, 1)])
def test_a_counter_that_begins_later_makes_fewer_iterations(start, iterations):
    text = LOOP.replace("tuple(%s, %x.1, %w.1)", "tuple(%copied, %x.1, %w.1)").replace(
        "  %start =", f"  %first = s32[] constant({start})\n  %copied = s32[] copy(%first)\n  %start ="
    )
    assert hlo.parse(text).matmul_flops() == iterations * 2 * 8 * 128 * 128


# One of a layer's results, summed over three slices by the runtime between them.
BETWEEN = """\
  %token = token[] after-all()
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%y, %token), channel_id=8, ATTRIBUTES
  %recv = (bf16[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=7, ATTRIBUTES
  %send-done = token[] send-done(%send), channel_id=8, is_host_transfer=true
  %recv-done = (bf16[8,128]{1,0}, token[]) recv-done(%recv), channel_id=7, is_host_transfer=true
""".replace(
    "ATTRIBUTES",
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum.7_0",'
    '_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_what_is_sent_to_other_slices_and_comes_back_is_one_collective_between_them():
    program = hlo.parse(LOOP.replace("  ROOT %out =", BETWEEN + "  ROOT %out ="))
    (within,) = hlo.parse(LOOP).collectives()
    between = hlo.Collective("all-reduce", 4, 2 * 8 * 128, 3, False, True)
    assert program.collectives() == [within, between]
    # It is read on its way out and written on its way in.
    assert program.hbm_bytes() == hlo.parse(LOOP).hbm_bytes() + 4 * 2 * (2 * 8 * 128)


@pytest.mark.parametrize("known", ["ALL_REDUCE", "{1,2,3}x{0:3}", "psum.7_0"])
def test_a_transfer_between_slices_in_an_unknown_form_is_not_passed_over(known):
    assert known in BETWEEN
    other = BETWEEN.replace(known, "")
    with pytest.raises(ValueError, match="unknown transfer between slices"):
        hlo.parse(LOOP.replace("  ROOT %out =", other + "  ROOT %out =")).collectives()


def test_traffic_is_the_slice_of_what_is_sliced_and_nothing_for_what_stays_in_the_core():
    matrix, rows, scalar = 4 * 128 * 128, 2 * 8 * 128, 4
    # The slice is read and written, gathered twice, and multiplied; the counter's result is not in HBM.
    each = (2 * matrix + scalar) + 2 * 2 * matrix + (matrix + 2 * rows) + scalar
    assert hlo.parse(LOOP).hbm_bytes() == 4 * each + _condition_bytes(LOOP)


def _condition_bytes(text: str) -> int:
    """The comparison reads a counter and a constant, and writes a flag, once an iteration."""
    assert "compare(%count, %four)" in text
    return 4 * (4 + 4 + 1)


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    options = {"topology": "v5e-4", "slices": 1, "steps": 1, "pairs_per_step": 1, "what": "train"}
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**options, out=str(tmp_path)))
    monkeypatch.setattr(recipes, "from_flag", lambda: ("tiny", TrainConfig()))
    monkeypatch.setattr(aot, "find_target", lambda *names: "v5e:2x2")
    monkeypatch.setattr(aot, "run", lambda *arguments, **sizes: pytest.fail("it was compiled"))
    with pytest.raises(UserError, match="it is a directory; give the name of a file"):
        aot.main([])


@pytest.mark.parametrize(("scope", "passes"), [("at_most_11_passes/", 11), ("", 1)])
def test_a_search_counts_as_often_as_its_name_says(scope, passes):
    text = LOOP.replace("%four = s32[]{:T(128)} constant(4)", "%four = s32[]{:T(128)} copy(%q)")
    loop = "condition=%below, body=%body"
    assert loop in text
    text = text.replace(loop, f'{loop}, metadata={{op_name="jit(f)/{scope}while"}}')
    program = hlo.parse(text)
    assert program.matmul_flops() == passes * 2 * 8 * 128 * 128
    assert [(each.count, each.in_search) for each in program.collectives()] == [(passes, True)]


@pytest.mark.parametrize("ways", [2, 8])
@pytest.mark.parametrize("span", [1, 2, 7, 100, 1000])
def test_no_search_takes_more_passes_than_its_name_says(span, ways):
    counts = []
    wanted = np.arange(span)

    def count(t):
        counts.append(t)
        return 2 * (wanted >= t)  # never exactly k, so that no search ends early

    ones = np.ones(span, np.int32)
    with jax.disable_jit():
        found, _, _ = selection.bisect_counts(
            count, ones, lo=0 * ones, hi=span * ones, n_lo=2 * ones, n_hi=0 * ones, span=span, ways=ways
        )  # fmt: skip
    np.testing.assert_array_equal(found, wanted)
    assert len(counts) <= selection._passes(span, ways) * (ways - 1)
    # Negative control: the bound is no idle one.
    assert len(counts) >= (selection._passes(span, ways) - 2) * (ways - 1)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # As the TPU compiler writes (B, T, K) x (B, K, S): batches are positions of a dilated window.
        ("%c = f32[4,6,8,8]{3,2,1,0} convolution(%a, %b), window={size=4x6 stride=3x5 lhs_dilate=4x6}, "
         "dim_labels=01bf_01io->01bf", 2 * 4 * 6 * 8 * 16 * 8),
        # Summed over two axes at once: a gradient of weights.
        ("%c = f32[16,8,1]{1,0,2} convolution(%d, %e), window={size=4}, dim_labels=0fb_0io->bf0",
         2 * 4 * 7 * 16 * 8),
        ("%c = f32[5,3]{1,0} dot(%f, %g), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
         2 * 5 * 3 * 9),
    ],
    ids=["batched", "summed", "dot"],
)  # fmt: skip
def test_products_are_counted_without_padding(line, flops):
    shapes = {"a": "4,6,8,16", "b": "4,6,16,8", "d": "4,7,16", "e": "4,7,8", "f": "9,5", "g": "9,3"}
    parameters = [
        f"  %{name} = f32[{shape}]{{0}} parameter({i})" for i, (name, shape) in enumerate(shapes.items())
    ]
    text = "\n".join(["ENTRY %main (a: f32[1]) -> f32[1] {", *parameters, f"  ROOT {line}", "}"])
    assert hlo.parse(text).matmul_flops() == flops


@pytest.mark.parametrize(
    ("groups", "size"),
    [("mesh['a'=2,'b'=4] {'b'}", 4), ("mesh['a'=2,'b'=4] {'a','b'}", 8), ("[4,2]<=[8]", 2),
     ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={2}", 4),
     ("{{0,1,2},{3,4,5}}", 3)],
)  # fmt: skip
def test_every_way_to_write_groups_is_read(groups, size):
    text = LOOP.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", groups)
    (gather,) = hlo.parse(text).collectives()
    assert gather.group == size


# Topologies -------------------------------------------------------------------------------------------


def test_names_that_people_use_are_as_many_chips_as_they_say():
    assert aot.TOPOLOGIES["v5e-256"] == "v5e:16x16"
    assert aot.TOPOLOGIES["v5p-128"] == "v5p:4x4x4"
    for name, topology in aot.TOPOLOGIES.items():
        kind, units = name.split("-")
        chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
        assert chips * aot.CHIPS[kind].cores == int(units), name


@pytest.mark.parametrize("name", ["v5e-17", "v7-8", "v5e", "v5e:axb", "gpu:2x2", "v5e:"])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(UserError, match=r"known ones are .*v5e-16.*v5p-128.*v6e-256"):
        aot.find_target(name)


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu")


@pytest.mark.parametrize("name", ["v4-8", "v5e-16", "v5litepod-16", "v5p-128", "v6e-256", "v5e:2x4"])
def test_libtpu_knows_the_topologies_with_one_device_a_chip(libtpu, name):
    target = aot.find_target(name)
    assert len(target.devices) == math.prod(int(n) for n in target.name.split(":")[1].split("x"))


@pytest.mark.parametrize(("name", "fsdp"), [("v5e-32", 16), ("v6e-32", 16), ("v5p-64", 16), ("v6e-64", 32)])
def test_a_mesh_may_divide_an_axis_of_the_slice(libtpu, name, fsdp):
    devices = aot.find_target(name).devices
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=fsdp), devices)
    assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}
    assert set(mesh.devices.ravel()) == set(devices)


def test_several_slices_share_out_the_data_and_nothing_else(libtpu):
    two = aot.find_target("v5e-8", slices=2)
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=4), two.devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
    assert set(mesh.devices.ravel()) == set(two.devices)
    for group in mesh.devices:
        assert len({device.slice_index for device in group.ravel()}) == 1
    with pytest.raises(UserError, match="data must be a multiple of the 2 slices, got 1"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=16), two.devices)


def test_a_grid_that_libtpu_does_not_know_is_refused_in_one_line(libtpu):
    with pytest.raises(UserError, match="libtpu knows no topology 'v5e:3x5'") as error:
        aot.find_target("v5e:3x5")
    assert "\n" not in str(error.value)


# Compiling --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(libtpu):
    """What the command saves for a small recipe on four chips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSPARSE_TPU_KERNELS", "1")
        target = aot.find_target("v5e-4")
        yield aot.run(CONFIG, target, "all", steps=3, pairs_per_step=2)


@pytest.mark.slow
def test_a_train_step_a_projection_and_a_pruning_run_compile_and_fit(reports):
    assert set(reports["programs"]) == {"train", "projection", "prune"}
    assert reports["fits"]
    for report in reports["programs"].values():
        memory = report["memory"]
        assert 0 < memory["arguments"] < memory["total"] < report["hbm_bytes"] == 16 * 2**30
    json.dumps(reports)


@pytest.mark.slow
def test_attention_is_the_kernel_and_its_products_are_counted(reports):
    # The backward pass finds the scores again: one product of six more than the model's own count.
    scores = 3 * 2 * 2 * 128 * 128 * 128 * 8
    step = reports["programs"]["train"]
    assert step["flops"] == pytest.approx(step["model_flops"] + scores / 2 / 4)


@pytest.mark.slow
def test_arguments_are_a_chips_share_of_the_state(reports):
    memory = reports["programs"]["train"]["memory"]
    state = jax.eval_shape(lambda: init_state(CONFIG))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert whole / 2 <= memory["arguments"] < 0.75 * whole
    assert memory["aliased"] > 0.9 * memory["outputs"]


@pytest.mark.slow
def test_flops_are_the_models(reports):
    assert 0.95 < reports["programs"]["train"]["flops_ratio"] <= 1.05
    # Three steps of a scan; the last layer's queries and neurons are computed at one position only.
    assert 0.6 < reports["programs"]["prune"]["flops_ratio"] <= 1.05


def test_the_models_count_is_six_flops_a_weight_and_token_and_the_scores():
    weights = 3 * 12 * 128**2 + 128 * 256
    scores = 2 * 3 * 128 * 128
    assert model.forward_flops(CONFIG.model, 8 * 128) == 2 * 8 * 128 * (weights + scores)


@pytest.mark.slow
def test_the_projection_gathers_nothing_and_counts_little(reports):
    report = reports["programs"]["projection"]
    assert set(report["collectives"]) == {"all-reduce"}
    assert report["collectives"]["all-reduce"]["bytes"] < 64 * 1024
    # Negative control: the step around it gathers weights.
    assert reports["programs"]["train"]["collectives"]["all-gather"]["bytes"] > 3 * 12 * 128**2 * 2


@pytest.mark.slow
def test_only_gradients_cross_from_one_slice_to_another(libtpu, monkeypatch):
    """Two slices of four chips: the same step as on one slice of eight, its gradients summed over both."""
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    target = aot.find_target("v5e-4", slices=2)
    report = aot.run(config, target, "train", steps=1, pairs_per_step=1)
    step, projection = (report["programs"][name] for name in ("train", "projection"))
    assert report["fits"] and step["flops_ratio"] <= 1.05
    assert projection["collectives_between_slices"] == {}
    assert set(step["collectives_between_slices"]) == {"all-reduce"}
    # Matrices in bfloat16, a quarter on each chip; a few sums in float32.
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init_state(CONFIG)).params)
    gradients = 2 * sum(leaf.size for leaf in shapes) / 4
    assert gradients <= step["collectives_between_slices"]["all-reduce"]["bytes"] < 1.5 * gradients
    # They go over the network of the data center, not over the links of a slice.
    assert step["roofline_seconds"]["network"] == pytest.approx(
        step["collectives_between_slices"]["all-reduce"]["bytes"] / 3.125e9
    )


def test_groups_that_are_written_in_an_unknown_way_are_not_passed_over():
    with pytest.raises(ValueError, match="unknown replica groups"):
        hlo.parse(LOOP.replace("mesh['axis_0'", "grid['axis_0'")).collectives()


@pytest.mark.slow
def test_no_activations_cross_chips_and_trials_do_not_meet(reports):
    assert "all-to-all" not in reports["programs"]["train"]["collectives"]
    assert "collective-permute" not in reports["programs"]["train"]["collectives"]
    assert reports["programs"]["prune"]["collectives"] == {}


def test_what_does_not_fit_is_said_and_fails(libtpu, monkeypatch):
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    target = aot.find_target("v5e-1")
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    shape = jax.ShapeDtypeStruct((1 << 30,), jnp.float32, sharding=place)
    too_much = jax.jit(lambda *arrays: sum(a.sum() for a in arrays)).lower(*[shape] * 5)
    report = aot.compile_report(too_much, target, flops=0.0)
    assert not report["fits"]
    assert "DOES NOT FIT" in aot.describe("sum", report)
    little = jax.jit(lambda a: a.sum()).lower(shape)
    assert aot.compile_report(little, target, flops=0.0)["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e-16"], "--config is missing"),
        (["--config=configs/tiny.py", "--topology=v5e-3"], "known ones are"),
        (["--config=gao:7m", "--topology=v5e-4", "--config.mesh.fsdp=3"], "4 devices"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message):
    done = run_python("-m", "wsparse.aot", *arguments, cwd=REPO)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_program_of_a_step_is_the_same_for_every_density(libtpu, monkeypatch):
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    devices = aot.find_target("v5e-4").devices

    def lowered(density):
        sparsity = dataclasses.replace(CONFIG.sparsity, density=density)
        config = dataclasses.replace(CONFIG, sparsity=sparsity)
        program = make_program(config, sharding.make_mesh(config.mesh, devices))
        return aot.train_step(config, program)[0].as_text().splitlines()

    pairs = zip(lowered(0.1), lowered(0.001), strict=True)
    different = [line for pair in pairs if pair[0] != pair[1] for line in pair]
    assert different
    assert all(re.search(r"stablehlo.constant dense<[^>]*> : tensor<f32>", each) for each in different)


def load(name: str) -> tuple[TrainConfig, str]:
    """A recipe and the slice that its docstring names."""
    variant = name.partition(":")[2]
    text = (REPO / "configs" / "gao.py").read_text()
    (topology,) = re.findall(rf"\| {variant} \|.* TPU (v\w+-\d+)", text)
    return from_dict(TrainConfig, recipes.load(name)), topology


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_slice_that_its_mesh_and_batch_divide_over(name):
    config, topology = load(name)
    chips = math.prod(int(n) for n in aot.TOPOLOGIES[topology].split(":")[1].split("x"))
    mesh = config.mesh
    assert chips % (mesh.fsdp * mesh.tensor) == 0
    assert (config.batch_size // config.accumulate) % (chips // mesh.tensor) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compiles_and_fits_on_its_slice(libtpu, monkeypatch, name):
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    config, topology = load(name)
    report = aot.run(config, aot.find_target(topology), "train", steps=1, pairs_per_step=1)
    assert report["fits"]
    step = report["programs"]["train"]
    assert step["flops_ratio"] <= (1.4 if config.model.remat else 1.05)
    _check_projection(report["programs"]["projection"])


def _check_projection(report):
    assert report["fits"]
    assert "all-gather" not in report["collectives"]
    assert sum(kind["bytes"] for kind in report["collectives"].values()) <= 64 * 1024


def test_a_layers_matrices_are_divided_along_their_neurons():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = jax.eval_shape(lambda: init_state(CONFIG)).params
    places = sharding.tree_shardings(shapes, mesh)["blocks"]
    assert places["mlp"]["fc"]["kernel"] == NamedSharding(mesh, P(None, None, ("tensor", "fsdp")))
    assert places["mlp"]["proj"]["kernel"] == NamedSharding(mesh, P(None, ("tensor", "fsdp"), None))

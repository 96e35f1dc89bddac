"""The launch scripts are sound shell, say what they would run, and run the commands they should."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(path for path in LAUNCH.glob("*.sh"))
PROGRAMS = ("gcloud", "xpk", "sbatch", "srun", "scontrol", "squeue", "scancel", "kubectl", "docker")
# Records its name, arguments and, where it is given something, its input; then does what it was told.
FAKE = """#!{python} -IS
import json, os, sys
here = {folder!r}
name = os.path.basename(sys.argv[0])
given = sys.stdin.read() if name == "kubectl" else ""
with open(here + "/calls", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:], *([given] if given else [])]) + "\\n")
for number, (words, answer, status) in enumerate(json.load(open(here + "/answers"))):
    done = here + f"/answered-{{number}}"
    if set(words) <= {{name, *sys.argv[1:]}} and not os.path.exists(done):
        open(done, "w").close()
        print(answer)
        sys.exit(status)
sys.exit(0)
"""


class Machine:
    """A PATH on which the programs of the cloud only write down how they were called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.calls_file = folder / "calls"
        (folder / "bin").mkdir()
        self.answer()
        for program in PROGRAMS:
            path = folder / "bin" / program
            path.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def answer(self, *answers: tuple[tuple[str, ...], str, int]) -> None:
        """What calls that have certain words print and return, each once, in this order."""
        for path in self.folder.glob("answered-*"):
            path.unlink()
        (self.folder / "answers").write_text(json.dumps(answers))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [LAUNCH / script, *arguments],
            env=kept | {"PATH": path} | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


TPU = {"NAME": "sparse", "ZONE": "europe-west4-b", "TYPE": "v5litepod-16", "POLL": "0"}
GKE = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "TYPE": "v5litepod-16", "IMAGE": "i:1",
       "BUCKET": "gs://b", "STORAGE": 'postgresql://u:a"b@h/s'}  # fmt: skip
TRAIN = ("wsparse.train", "--config=configs/tiny.py", "--workdir=a folder/it's")
ALL = [
    ("tpu_vm.sh", ("create",), TPU),
    ("tpu_vm.sh", ("setup",), TPU),
    ("tpu_vm.sh", ("run", *TRAIN), TPU),
    ("tpu_vm.sh", ("babysit", *TRAIN), TPU | {"BUCKET": "b"}),
    ("tpu_vm.sh", ("status",), TPU),
    ("tpu_vm.sh", ("delete",), TPU),
    ("gke.sh", ("image",), GKE),
    ("gke.sh", ("create",), GKE),
    ("gke.sh", ("storage",), GKE),
    ("gke.sh", ("run", *TRAIN), GKE),
    ("gke.sh", ("sweep", "--run=/bucket/r"), GKE),
    ("gke.sh", ("status",), GKE),
    ("gke.sh", ("stop",), GKE),
    ("gke.sh", ("delete",), GKE),
    ("slurm.sh", ("run", *TRAIN), {}),
    ("slurm.sh", ("sweep", "--run=r"), {}),
    ("slurm.sh", ("status",), {}),
    ("slurm.sh", ("stop",), {}),
    ("local.sh", TRAIN, {}),
]


# Soundness --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(tmp_path):
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR/.."]
    found = subprocess.run([*command, *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    # Control: it would say something.
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run([*command, tmp_path / "bad.sh"], capture_output=True).returncode == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_stops_at_the_first_error(script):
    text = script.read_text()
    if script.name == "lib.sh":
        assert not os.access(script, os.X_OK)
    else:
        assert "\nset -euo pipefail\n" in text
        assert os.access(script, os.X_OK)


def test_every_command_is_described_where_it_is_used():
    readme = (LAUNCH / "README.md").read_text()
    for script, (verb, *_), _ in ALL:
        usage = (LAUNCH / script).read_text().split("\n\nset -euo")[0]
        if script != "local.sh":
            assert f"launch/{script} {verb}" in usage or f"| {verb}" in usage, (script, verb)
        assert script in readme


# Dry runs and mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "arguments", "variables"), ALL, ids=lambda v: str(v)[:30])
def test_a_dry_run_prints_commands_and_runs_none(machine, script, arguments, variables):
    done = machine.run(script, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("+ ") for line in done.stdout.splitlines())
    assert machine.calls() == []
    # Control: without it something is run.
    if script != "local.sh":
        machine.answer(*[(("describe",), "ACTIVE", 0)] * 3)
        assert machine.run(script, *arguments, **variables).returncode == 0
        assert machine.calls() != []


@pytest.mark.parametrize(
    ("script", "verb", "variables", "missing"),
    [
        ("tpu_vm.sh", "create", TPU, "NAME"),
        ("tpu_vm.sh", "create", TPU, "ZONE"),
        ("tpu_vm.sh", "create", TPU, "TYPE"),
        ("tpu_vm.sh", "babysit", TPU | {"BUCKET": "b"}, "BUCKET"),
        ("gke.sh", "create", GKE, "PROJECT"),
        ("gke.sh", "create", GKE, "CLUSTER"),
        ("gke.sh", "storage", GKE, "BUCKET"),
        ("gke.sh", "run", GKE, "IMAGE"),
        ("gke.sh", "sweep", GKE, "BUCKET"),
        ("gke.sh", "sweep", GKE, "STORAGE"),
    ],
)
def test_a_missing_variable_is_named_before_anything_is_run(machine, script, verb, variables, missing):
    kept = {name: value for name, value in variables.items() if name != missing}
    done = machine.run(script, verb, "wsparse.train", **kept)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: set {missing} (")
    assert machine.calls() == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh", "local.sh"])
def test_without_arguments_a_script_says_how_it_is_used(machine, script):
    done = machine.run(script, **GKE, **{k: v for k, v in TPU.items() if k not in GKE})
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr
    assert "set -euo" not in done.stderr
    if script != "local.sh":
        again = machine.run(script, "dance", **TPU | GKE)
        assert (again.returncode, again.stderr) == (2, done.stderr)
    assert machine.calls() == []


def test_a_missing_program_is_named(machine):
    (machine.folder / "bin" / "xpk").unlink()
    done = machine.run("gke.sh", "create", **GKE, PATH=f"{machine.folder / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "error: xpk is not on the PATH: pip install xpk" in done.stderr


# Cloud TPU --------------------------------------------------------------------------------------------


def test_create_asks_for_a_slice_and_waits_until_it_is_there(machine):
    machine.answer(
        (("describe",), "WAITING_FOR_RESOURCES", 0),
        (("describe",), "PROVISIONING", 0),
        (("describe",), "ACTIVE", 0),
    )
    done = machine.run("tpu_vm.sh", "create", **TPU, PROJECT="p")
    assert done.returncode == 0, done.stderr
    create, *looks = machine.calls()
    assert create == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "sparse",
        "--zone=europe-west4-b", "--project=p", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=sparse", "--spot",
    ]  # fmt: skip
    assert len(looks) == 3
    assert "sparse: PROVISIONING" in done.stdout


def test_several_slices_are_asked_for_at_once_and_each_is_run_on(machine):
    machine.answer((("describe",), "ACTIVE", 0))
    assert machine.run("tpu_vm.sh", "create", **TPU, SLICES="2", SPOT="0").returncode == 0
    create = machine.calls()[0]
    assert create[-2:] == ["--node-count=2", "--node-prefix=sparse"]
    assert machine.run("tpu_vm.sh", "run", "wsparse.doctor", **TPU, SLICES="2").returncode == 0
    runs = sorted(call for call in machine.calls() if "ssh" in call)
    assert [call[5] for call in runs] == ["sparse-0", "sparse-1"]
    assert all("--worker=all" in call for call in runs)


def test_a_request_that_failed_is_reported(machine):
    machine.answer((("describe",), "FAILED", 0))
    done = machine.run("tpu_vm.sh", "create", **TPU)
    assert done.returncode == 1
    assert "error: the request is FAILED" in done.stderr


def test_arguments_reach_the_hosts_as_they_were_given(machine):
    assert machine.run("tpu_vm.sh", "run", *TRAIN, **TPU).returncode == 0
    (call,) = machine.calls()
    (command,) = [word for word in call if word.startswith("--command=")]
    said = command.removeprefix("--command=").replace("exec .venv/bin/python", "printf '%s\\n'")
    (machine.folder / "wsparse").mkdir()
    heard = subprocess.run(
        ["bash", "-c", said], cwd=machine.folder, capture_output=True, text=True, check=True
    )
    assert heard.stdout.splitlines() == ["-m", *TRAIN]


def test_babysit_begins_again_after_a_preemption_until_training_is_done(machine):
    machine.answer(
        (("describe",), "", 1),  # there is none yet
        (("describe",), "ACTIVE", 0),
        (("ssh", "--command=cd wsparse && exec .venv/bin/python -m wsparse.train "), "", 255),
        (("describe",), "SUSPENDED", 0),  # so this was a preemption
        (("describe",), "SUSPENDED", 0),
        (("describe",), "ACTIVE", 0),
    )
    done = machine.run("tpu_vm.sh", "babysit", "wsparse.train", **TPU, BUCKET="b")
    assert done.returncode == 0, done.stderr
    verbs = [
        next((v for v in ("create", "delete", "describe", "scp") if v in call), call[-1].split()[-2:])
        for call in machine.calls()
    ]
    assert verbs.count("create") == 2
    assert verbs.count("delete") == 1
    assert verbs.index("delete") > verbs.index("create")
    assert verbs.count(["-m", "wsparse.train"]) == 2
    assert "sparse: done" in done.stdout


@pytest.mark.parametrize("patience", [3, 1000])
def test_what_a_lost_connection_left_is_waited_for_and_killed_only_when_it_stays(machine, patience):
    """`patience` is how many looks find it still there."""
    machine.answer(*[(("describe",), "ACTIVE", 0)] * 3)
    assert machine.run("tpu_vm.sh", "babysit", "wsparse.train", **TPU, BUCKET="b").returncode == 0
    (command,) = [word for call in machine.calls() for word in call if "pkill" in word]
    stand_ins = (
        'pkill() { echo "pkill $*"; }; sleep() { echo sleep; }\n'
        f'pgrep() {{ echo "pgrep $*" >&2; ((++looks <= {patience})); }}\n'
    )
    heard = subprocess.run(
        ["bash", "-c", stand_ins + command.removeprefix("--command=")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    left = "-f [.]venv/bin/python -m wsparse"
    assert set(heard.stderr.splitlines()) == {f"pgrep {left}"}
    asked, *waited = heard.stdout.splitlines()
    assert asked == f"pkill -TERM {left}"
    stays = [f"pkill -KILL {left}", "sleep"]
    assert waited == (["sleep"] * 3 if patience == 3 else ["sleep"] * 180 + stays)


def test_babysit_gives_up_on_a_mistake_instead_of_paying_for_it(machine):
    command = "--command=cd wsparse && exec .venv/bin/python -m wsparse.train "
    machine.answer(
        *[(("ssh", command), "error: no such config", 2)] * 9, *[(("describe",), "ACTIVE", 0)] * 30
    )
    done = machine.run("tpu_vm.sh", "babysit", "wsparse.train", **TPU, BUCKET="b")
    assert done.returncode == 1
    assert "failed 3 times on a healthy slice, which still costs" in done.stderr
    assert sum(command in call for call in machine.calls()) == 3


# GKE --------------------------------------------------------------------------------------------------


def test_a_workload_is_created_with_its_command_and_restarts(machine):
    assert machine.run("gke.sh", "run", *TRAIN, **GKE, SLICES="2").returncode == 0
    (call,) = machine.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    for word in ("--cluster=c", "--project=p", "--zone=z", "--tpu-type=v5litepod-16",
                 "--num-slices=2", "--docker-image=i:1", "--workload=wsparse"):  # fmt: skip
        assert word in call
    said = call[-1].removeprefix("--command=").replace("python", "printf '%s\\n'", 1)
    heard = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True)
    assert heard.stdout.splitlines() == ["-m", *TRAIN]


def test_a_sweep_is_a_job_set_of_independent_workers(machine):
    arguments = ["--run=/bucket/runs/a b", '--task="x"']
    assert machine.run("gke.sh", "sweep", *arguments, **GKE, WORKERS="3").returncode == 0
    (call,) = machine.calls()
    assert call[:3] == ["kubectl", "apply", "--filename=-"]
    _, manifest = yaml.safe_load_all(call[3])
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = manifest["spec"]["replicatedJobs"]
    assert workers["replicas"] == 3
    pod = workers["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "wsparse.prune", *arguments, "--storage=$(STORAGE)"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_a_worker_that_was_preempted_begins_again_and_a_mistake_ends_the_sweep(machine):
    assert machine.run("gke.sh", "sweep", "--run=r", **GKE).returncode == 0
    _, manifest = yaml.safe_load_all(machine.calls()[0][3])
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 0}
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    mistake, preemption = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    named = pod["containers"][0]["name"]
    assert mistake == {
        "action": "FailJob", "onExitCodes": {"containerName": named, "operator": "In", "values": [2]},
    }  # fmt: skip
    assert preemption["action"] == "Ignore"
    # Kubernetes refuses the rules otherwise.
    assert pod["restartPolicy"] == "Never"
    assert preemption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_a_password_is_in_a_secret_alone(machine):
    done = machine.run("gke.sh", "sweep", "--run=r", **GKE)
    secret, manifest = yaml.safe_load_all(machine.calls()[0][3])
    assert secret["stringData"] == {"url": GKE["STORAGE"]}
    assert GKE["STORAGE"] not in str(manifest) and "postgresql" not in done.stdout + done.stderr
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (variable,) = pod["containers"][0]["env"]
    assert (secret["kind"], variable["name"]) == ("Secret", "STORAGE")
    assert variable["valueFrom"]["secretKeyRef"] == {"name": secret["metadata"]["name"], "key": "url"}


def test_the_readme_sweeps_on_slices_that_the_sweeps_workers_fit(machine):
    """A slice of TYPE v5litepod-N has N chips."""
    assert machine.run("gke.sh", "sweep", "--run=r", **GKE).returncode == 0
    _, manifest = yaml.safe_load_all(machine.calls()[0][3])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    (chips,) = [container["resources"]["limits"]["google.com/tpu"] for container in pod["containers"]]
    assert chips == int(rows) * int(columns)
    readme = (LAUNCH / "README.md").read_text()
    before_sweep = readme.split("gke.sh sweep --run")[0]
    assert before_sweep.rsplit("TYPE=", 1)[1].split()[0] == f"v5litepod-{chips}"


def test_what_git_ignores_is_not_copied_into_the_image():
    root = LAUNCH.parent
    kept_out = {line.removeprefix("**/") for line in (root / ".dockerignore").read_text().split("\n")}
    ignored = [line.strip("/") for line in (root / ".gitignore").read_text().splitlines()]
    assert {*ignored, ".git"} <= kept_out


def test_names_cannot_change_a_manifest(machine):
    hostile = {"NAME": 'n"\n  x: y', "IMAGE": "i: {a}", "BUCKET": "gs://b # c"}
    assert machine.run("gke.sh", "sweep", "--run=r", **GKE | hostile).returncode == 0
    _, manifest = yaml.safe_load_all(machine.calls()[0][3])
    # A line break in a YAML string is a space.
    assert manifest["metadata"] == {"name": 'n" x: y-sweep'}
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == hostile["IMAGE"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b # c"


# Slurm ------------------------------------------------------------------------------------------------


def test_an_interpreter_with_a_comma_in_its_path_reaches_the_job(machine):
    """Slurm divides --export at commas."""
    done = machine.run("slurm.sh", "sweep", "--run=r", PYTHON="/a,b/python", DRY_RUN="1")
    line = done.stdout.splitlines()[-1].removeprefix("+")
    probe = line.replace(" sbatch ", " printenv PYTHON #")
    heard = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    assert heard.stdout == "/a,b/python\n"
    assert "--export=ALL " in line


def test_a_job_has_a_process_for_every_gpu_and_is_told_before_it_ends(machine):
    variables = {"NODES": "2", "GPUS": "4", "PARTITION": "gpu", "TIME": "4:00:00"}
    assert machine.run("slurm.sh", "run", *TRAIN, **variables).returncode == 0
    (call,) = machine.calls()
    for word in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu",
                 "--time=4:00:00", "--signal=TERM@120", "--requeue"):  # fmt: skip
        assert word in call
    assert call[-4:] == [str(LAUNCH / "slurm_job.sh"), *TRAIN]
    assert (machine.folder / "logs").is_dir()


def test_a_sweep_is_a_job_array(machine):
    assert machine.run("slurm.sh", "sweep", "--run=r", WORKERS="5").returncode == 0
    (call,) = machine.calls()
    assert "--array=0-4" in call
    assert call[-2:] == ["wsparse.prune", "--run=r"]


@pytest.mark.parametrize(
    ("status", "array", "requeued"),
    [(0, {}, None), (2, {}, None), (143, {}, "7"),
     (143, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3")],
)  # fmt: skip
def test_a_job_queues_again_only_after_it_was_told_to_stop(machine, status, array, requeued):
    machine.answer((("srun",), "", status))
    variables = {"SLURM_SUBMIT_DIR": str(machine.folder), "SLURM_JOB_ID": "7", "PYTHON": "py"}
    done = machine.run("slurm_job.sh", *TRAIN, **variables | array, SLURM_CPUS_PER_TASK="6")
    assert done.returncode == status
    srun, *others = machine.calls()
    assert "--cpus-per-task=6" in srun
    assert srun[-5:] == ["py", "-m", *TRAIN]
    assert others == ([] if requeued is None else [["scontrol", "requeue", requeued]])


# Local ------------------------------------------------------------------------------------------------

WORKER = """#!{python}
import os, signal, sys, time
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS")
print(*(os.environ[name] for name in names), *sys.argv[1:], flush=True)
def stop(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if "wait" in sys.argv:
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(os.environ["JAX_PROCESS_ID"]) == 1 and 3)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker"
    path.write_text(WORKER.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_local_processes_know_each_other_and_a_failure_is_passed_on(machine, worker):
    done = machine.run("local.sh", *TRAIN, PROCESSES="3", DEVICES="2", PORT="1234", PYTHON=worker)
    assert done.returncode == 3
    lines = sorted(line for line in done.stdout.splitlines() if not line.startswith("+"))
    flag = "--xla_force_host_platform_device_count=2"
    assert lines == [f"127.0.0.1:1234 3 {i} {flag} -m {' '.join(TRAIN)}" for i in range(3)]


def test_local_processes_meet_at_a_port_that_python_has_found_free(machine, worker, tmp_path):
    listening = tmp_path / "listening"
    listening.write_text(
        f'#!/bin/bash\nif [[ $1 == -c ]]; then {worker} "$@" | tee found; else {worker} "$@"; fi\n'
    )
    listening.chmod(0o755)
    done = machine.run("local.sh", *TRAIN, PROCESSES="1", PYTHON=str(listening))
    port = int((machine.folder / "found").read_text())
    assert f"\n127.0.0.1:{port} 1 0 " in done.stdout
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_signal_to_the_local_script_reaches_all_and_is_waited_for(worker, tmp_path):
    job = subprocess.Popen(
        [LAUNCH / "local.sh", "wait"], env=os.environ | {"PYTHON": worker}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        lines: list[str] = []
        while sum("waiting" in line for line in lines) < 2:
            lines.append(job.stdout.readline())
        job.send_signal(signal.SIGTERM)
        rest, _ = job.communicate(timeout=30)
    finally:
        job.kill()
    assert rest.count("saved") == 2
    assert job.returncode == 143

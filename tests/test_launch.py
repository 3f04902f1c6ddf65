"""launch/: the commands that the scripts start. Stand-ins for python, srun, scontrol and gcloud record their calls."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import DIGITS, ROOT, command, rows, run

LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh")
RUN = ["--config", "configs/digits_vit_tiny.py", "--workdir", 'it\'s "a" $HOME `b` {c}  *;& \\d é', "--x=", ""]
VARIABLES = {
    "TPU": "my-tpu", "ZONE": "my-zone", "TYPE": "v4-32", "VERSION": "my-version", "WORKLOAD": "my-run",
    "IMAGE": "r/i:t", "CLUSTER": "my-cluster", "CLAIM": "my-claim", "MOUNT": "/runs", "ACCELERATOR": "my-kind",
    "NODES": "3", "GPUS_PER_NODE": "8", "SLICES": "2", "HOSTS_PER_SLICE": "4", "CHIPS_PER_HOST": "4", "TOPOLOGY": "4x4",
}  # fmt: skip
OPTIONS = {"tpu_vm.sh": ["run"]}  # arguments before the run's command line

# Called as `python -m simmim_jax.main ...`. Records its arguments and environment, and exits with its entry of $CODES.
# If that is "wait", it records each signal and exits after the first one.
STAND_IN = f"""#!{sys.executable} -S
import json, os, signal, sys, time
from pathlib import Path
if sys.argv[1] == "-c":
    os.execv({sys.executable!r}, ["python", *sys.argv[1:]])
own = [word.partition("=")[2] for word in sys.argv if word.startswith("--process=")]
own = (own or [os.environ.get("SLURM_PROCID", "0")])[0]
folder = Path(os.environ["RECORDS"])
def write(name, text):
    (folder / (name + ".new")).write_text(text)
    (folder / (name + ".new")).rename(folder / name)
def stop(number, frame):
    with open(folder / ("signals." + own), "a") as file:
        file.write(signal.Signals(number).name + " ")
    global code
    code = 128 + number
code = json.loads(os.environ.get("CODES", "[0, 0]"))[int(own)]
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
write(own + ".json", json.dumps([sys.argv[1:], dict(os.environ), os.getpid()]))
print("process " + own + " of many", flush=True)
while code == "wait":
    time.sleep(0.01)
sys.exit(code)
"""

# Called as `srun [options] COMMAND`. Two tasks on two nodes; returns the highest exit code.
SRUN = f"""#!{sys.executable} -S
import os, subprocess, sys
line = [word for word in sys.argv[1:] if word not in ("--kill-on-bad-exit=0", "--wait=300")]
assert not line[0].startswith("-"), line
os.environ.update(SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", SLURM_STEP_NUM_NODES="2", SLURM_LOCALID="0")
tasks = [subprocess.Popen(line, env=os.environ | {{"SLURM_PROCID": str(i)}}) for i in range(2)]
with open(os.environ["RECORDS"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""

# Called as `scontrol show job ID` and `scontrol requeue ID`.
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$RECORDS/scontrol"
[[ $1 == show ]] && echo "JobId=$3 JobState=${STATE:-RUNNING} Reason=None"
exit 0
"""

# Called as `gcloud compute tpus tpu-vm ssh ...`. Runs the command of all hosts here, for two hosts in turn.
GCLOUD = """#!/usr/bin/env bash
for word; do
    case $word in --command=*) command=${word#--command=} ;; esac
done
[[ $4 == ssh && " $* " == *" --worker=all "* ]] || exit 0
status=0
for host in 0 1; do
    HOME=$RECORDS/host$host SLURM_PROCID=$host bash -c "$command" || status=$?
done
exit "$status"
"""


@pytest.fixture
def stand_ins(tmp_path):
    """(folder of the stand-ins' records, environment in which they are found first)."""
    programs = {"python": STAND_IN, "srun": SRUN, "scontrol": SCONTROL, "gcloud": GCLOUD}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "DRY_RUN", "XLA_FLAGS")}
    return tmp_path, env | VARIABLES | {"PATH": path, "RECORDS": str(tmp_path)}


def script(name, *arguments, env, timeout=60, meanwhile=lambda process: None) -> subprocess.CompletedProcess:
    """Run a script to its end, while `meanwhile` watches it. After a failure, kill everything that it started."""
    line = ["bash", str(LAUNCH / name), *arguments]
    options = {"env": env, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, start_new_session=True, **options) as process:
        try:
            meanwhile(process)
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            raise
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


def words(line: str) -> list[str]:
    """The words of a line, split by a shell."""
    made = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return made.stdout.split("\0")[:-1]


def record(folder, process) -> tuple[list[str], dict[str, str], int]:
    """(arguments, environment, process number) of a stand-in that has started."""
    path = Path(folder) / f"{process}.json"
    for _ in range(1000):
        if path.exists():
            return tuple(json.loads(path.read_text()))
        time.sleep(0.01)
    raise AssertionError(f"process {process} has not started within 10 s")


# All scripts.


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses_and_prints_its_usage(name, stand_ins):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert "set -euo pipefail" in (LAUNCH / name).read_text()
    _, env = stand_ins
    done = script(name, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    helped = script(name, "--help", env=env)
    assert helped.returncode == 0
    assert helped.stdout == done.stderr
    assert "--config configs/" in done.stderr
    assert "--dry-run" in done.stderr
    assert "set -e" not in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_starts_nothing_and_prints_the_unchanged_command_line(name, stand_ins):
    folder, env = stand_ins
    for program in ("srun", "scontrol", "gcloud"):
        (folder / "bin" / program).unlink()
    done = script(name, "--dry-run", *OPTIONS.get(name, []), *RUN, env=env)
    assert done.returncode == 0, done.stderr
    assert script(name, *OPTIONS.get(name, []), *RUN, env=env | {"DRY_RUN": "1"}).returncode == 0
    printed = words(done.stdout.replace("\n", " "))
    if name in ("tpu_vm.sh", "xpk.sh"):  # a remote shell splits it again
        (inner,) = (word.removeprefix("--command=") for word in printed if word.startswith("--command="))
        inner = re.search(r"python -m simmim_jax.main (.*?)(</dev/null|$)", inner)[1]
        assert words(inner) == RUN
    else:
        at = printed.index("simmim_jax.main")
        assert printed[at - 1 :] == ["-m", "simmim_jax.main", *RUN]
    assert list(folder.glob("*.json")) == []


@pytest.mark.parametrize(
    ("name", "arguments", "environment", "message"),
    [
        ("local.sh", ["--processes=two", "--workdir=x"], {}, "--processes=two - .* - give a number"),
        ("local.sh", ["--workdir=x"], {"PYTHON": "no-such-python"}, "no no-such-python - PATH - activate"),
        ("slurm.sbatch", ["--workdir=x"], {}, "not in a SLURM job - SLURM_JOB_ID - start with sbatch"),
        ("tpu_vm.sh", ["status"], {"TPU": ""}, "no TPU - environment - export TPU"),
        ("tpu_vm.sh", ["run"], {}, "no command line of the run"),
        ("tpu_vm.sh", ["begin"], {}, "unknown verb 'begin' - .* - choose one of create, delete"),
        ("xpk.sh", ["--workdir=x"], {"IMAGE": ""}, "no IMAGE - environment - export IMAGE"),
        ("xpk.sh", ["--workdir=x"], {}, "no xpk - PATH - install it"),
        ("xpk.sh", ["--jobset=cpu", "--workdir=x"], {}, "--jobset=cpu - .* - give --jobset=gpu or"),
    ],
)
def test_mistake_is_one_line(name, arguments, environment, message, stand_ins):
    _, env = stand_ins
    done = script(name, *arguments, env=env | environment)
    assert done.returncode == 2
    assert re.fullmatch(f"ERROR\\[launch\\] .*{message}.*\n", done.stderr), done.stderr


def test_launch_has_no_hyperparameter_and_its_configs_exist():
    for path in LAUNCH.iterdir():
        text = path.read_text()
        assert "--config." not in text, path.name
        for config in re.findall(r"configs/\w+\.py", text):
            assert (ROOT / config).exists(), (path.name, config)


# local.sh


def test_one_process_is_replaced_by_the_run(stand_ins):
    folder, env = stand_ins
    done = script("local.sh", *RUN, env=env | {"CODES": "[5]"})
    assert done.returncode == 5
    arguments, seen, _ = record(folder, 0)
    assert arguments == ["-m", "simmim_jax.main", *RUN]
    assert seen["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert "XLA_FLAGS" not in seen


def test_several_processes_get_one_coordinator_and_the_unchanged_command_line(stand_ins):
    folder, env = stand_ins
    done = script("local.sh", "--processes=2", "--devices-per-process=4", *RUN, env=env | {"XLA_FLAGS": "--xla_a=b"})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] process 0 of many", "[1] process 1 of many"]
    coordinators = set()
    for process in range(2):
        (*arguments, coordinator, count, own), seen, _ = record(folder, process)
        assert arguments == ["-m", "simmim_jax.main", *RUN]
        assert (count, own) == ("--processes=2", f"--process={process}")
        assert seen["XLA_FLAGS"] == "--xla_a=b --xla_force_host_platform_device_count=4"
        assert seen["JAX_PLATFORMS"] == "cpu"
        coordinators.add(coordinator)
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", coordinators.pop())
    assert not coordinators


def test_each_process_uses_its_own_gpu(stand_ins):
    folder, env = stand_ins
    assert script("local.sh", "--processes=2", "--workdir=x", env=env).returncode == 0
    assert [record(folder, i)[1]["JAX_LOCAL_DEVICE_IDS"] for i in range(2)] == ["0", "1"]


def test_exit_code_is_that_of_the_first_failed_process(stand_ins):
    _, env = stand_ins
    for codes, code in (("[0, 3]", 3), ("[4, 0]", 4)):
        assert script("local.sh", "--processes=2", "--workdir=x", env=env | {"CODES": codes}).returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_reaches_every_process_once_and_the_script_waits_for_all(number, code, stand_ins):
    folder, env = stand_ins

    def interrupt(process):
        for i in range(2):
            record(folder, i)
        os.killpg(process.pid, number)  # like Ctrl-C in a terminal: to the script and its group

    env |= {"CODES": '["wait", "wait"]'}
    done = script("local.sh", "--processes=2", "--workdir=x", env=env, meanwhile=interrupt, timeout=20)
    assert done.returncode == code
    assert [(folder / f"signals.{i}").read_text() for i in range(2)] == [f"{number.name} "] * 2


# slurm.sbatch


def in_a_job(stand_ins, codes, **environment):
    """(finished batch script, calls of scontrol)."""
    folder, env = stand_ins
    job = {"SLURM_JOB_ID": "77", "SLURM_CPUS_ON_NODE": "12", "CODES": codes}
    done = script("slurm.sbatch", *RUN, env=env | job | environment)
    calls = folder / "scontrol"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_stopped_slurm_job_is_requeued(stand_ins):
    done, calls = in_a_job(stand_ins, "[143, 143]", SLURM_RESTART_COUNT="3")
    assert done.returncode == 143
    assert calls == ["show job 77", "requeue 77"]
    for process in range(2):
        arguments, seen, _ = record(stand_ins[0], process)
        assert arguments == ["-m", "simmim_jax.main", *RUN]
        assert seen["SRUN_CPUS_PER_TASK"] == "12"


@pytest.mark.parametrize("code", [0, 5, 130])
def test_slurm_job_that_ended_or_failed_is_not_requeued(code, stand_ins):
    done, calls = in_a_job(stand_ins, f"[{code}, {code}]")
    assert done.returncode == code
    assert calls == []


def test_slurm_job_that_was_canceled_or_requeued_too_often_is_not_requeued(stand_ins):
    done, calls = in_a_job(stand_ins, "[143, 143]", STATE="CANCELLED")
    assert done.returncode == 143
    assert calls == ["show job 77"]
    done, calls = in_a_job(stand_ins, "[143, 143]", SLURM_RESTART_COUNT="100")
    assert "requeued 100 times" in done.stderr
    assert "requeue 77" not in calls


def test_slurm_job_has_one_task_per_node_and_an_early_signal():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head, _, rest = text.partition("set -euo pipefail")
    options = re.findall(r"^#SBATCH (\S+)$", head, re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=TERM@180", "--ntasks-per-node=1"} <= set(options)
    assert "#SBATCH" not in rest  # sbatch ignores them after the first command
    assert head.count("#SBATCH") == len(options)


# tpu_vm.sh


def test_run_on_tpu_hosts_survives_its_connection_starts_once_and_stops_by_sigterm(stand_ins):
    folder, env = stand_ins
    env |= {"CODES": '["wait", "wait"]'}
    for host in range(2):
        python = folder / f"host{host}" / "simmim_jax" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(folder / "bin" / "python")
    try:
        connections = []
        started = script("tpu_vm.sh", "run", *RUN, env=env, meanwhile=lambda process: connections.append(process.pid))
        assert started.returncode == 0
        for host in range(2):
            arguments, _, number = record(folder, host)
            assert arguments == ["-m", "simmim_jax.main", *RUN]
            assert os.getsid(number) != connections[0]  # a hangup of the connection does not reach it
        again = script("tpu_vm.sh", "run", *RUN, env=env)
        assert again.returncode == 1
        assert again.stderr.count("is already running") == 2
        status = script("tpu_vm.sh", "status", env=env).stdout
        assert status.count("running, process") == status.count("of many") == 2
    finally:
        stopped = script("tpu_vm.sh", "stop", env=env)
    assert stopped.stdout.count("ended with code 143") == 2, stopped
    assert [(folder / f"signals.{host}").read_text() for host in range(2)] == ["SIGTERM "] * 2


def test_verbs_of_tpu_vm_are_gcloud_commands(stand_ins):
    _, env = stand_ins
    env |= {"PROJECT": "my-project", "SPOT": "1", "SETUP_COMMAND": "mount it", "JAX": "jax[tpu]==0.10.2"}
    where = ["--zone=my-zone", "--project=my-project"]

    def printed(verb):
        lines = script("tpu_vm.sh", "--dry-run", verb, env=env).stdout.splitlines()
        lines = [words(line) for line in lines]
        assert all(line[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for line in lines)
        assert all(set(where) <= set(line) for line in lines)
        return [line[4:] for line in lines]

    kind = ["--accelerator-type=v4-32", "--version=my-version", "--spot"]
    assert printed("create") == [["create", "my-tpu", *where, *kind]]
    assert printed("delete") == [["delete", "my-tpu", *where, "--quiet"]]
    copy, install = printed("setup")
    assert (copy[0], copy[2], copy[-1]) == ("scp", "my-tpu:simmim_jax.tar.gz", "--worker=all")
    assert "-r requirements.txt 'jax[tpu]==0.10.2' ; mount it" in install[-1]
    assert printed("logs")[0][-2:] == ["--worker=0", "--command=tail -n 100 -F ~/simmim_jax/run.log"]
    for verb in ("setup", "status", "stop"):
        assert "--worker=all" in printed(verb)[-1]
        remote = printed(verb)[-1][-1].removeprefix("--command=")
        subprocess.run(["bash", "-n", "-c", remote], check=True)


# xpk.sh and the JobSets


def test_xpk_gets_image_slices_restarts_and_grace_period(stand_ins):
    _, env = stand_ins
    done = script("xpk.sh", "--dry-run", *RUN, env=env | {"XPK_FLAGS": "--storage=runs --priority=high"})
    printed = words(done.stdout)
    assert printed[:3] == ["xpk", "workload", "create"]
    assert printed[-1].startswith("--command=exec python -m simmim_jax.main ")
    assert {"--cluster=my-cluster", "--workload=my-run", "--docker-image=r/i:t", "--tpu-type=v4-32"} < set(printed)
    assert {"--num-slices=2", "--max-restarts=100", "--termination-grace-period-seconds=180"} < set(printed)
    assert {"--zone=my-zone", "--storage=runs", "--priority=high"} < set(printed)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_jobset_passes_the_unchanged_command_line_and_restarts_except_after_user_errors(kind, stand_ins):
    _, env = stand_ins
    words_of_kubernetes = ["$(HOME)", "${HOME}"]  # Kubernetes would replace the first
    done = script("xpk.sh", "--dry-run", f"--jobset={kind}", *RUN, *words_of_kubernetes, env=env)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert "${" not in json.dumps(manifest).replace("${HOME}", "")
    policy = manifest["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (100, "BlockingRecreate")
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == {"gpu": (1, 3, 3), "tpu": (2, 4, 4)}[kind]
    (container,) = job["template"]["spec"]["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3, 4, 5]}
    assert "command" not in container  # the entry point of the image, which is not a shell
    assert container["args"] == [*RUN, "$$(HOME)", "${HOME}"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/runs"}


def test_pods_of_a_gpu_jobset_connect_to_the_first_pod(stand_ins):
    _, env = stand_ins
    manifest = yaml.safe_load(script("xpk.sh", "--dry-run", "--jobset=gpu", *RUN, env=env).stdout)
    (jobs,) = manifest["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    first = f"{manifest['metadata']['name']}-{jobs['name']}-0-0.{manifest['metadata']['name']}"
    assert variables == {"JAX_COORDINATOR_ADDRESS": f"{first}:8476", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": None}
    wait = pod["initContainers"][0]["command"]
    assert f'gethostbyname("{first}")' in wait[2]
    compile(wait[2], "initContainer", "exec")


# skypilot.yaml


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_node_runs_the_unchanged_command_line_and_joins_the_others(nodes, stand_ins):
    folder, env = stand_ins
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = folder / "simmim-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(folder / "bin" / "python")
    env |= {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": f"{nodes}"}
    env |= {"SKYPILOT_NODE_RANK": f"{nodes - 1}", "HOME": str(folder), "RUN": shlex.join(RUN), "CODES": "[143, 143]"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 143, done.stderr
    joined = ["--coordinator=10.0.0.7:8476", "--processes=2", "--process=1"] if nodes == 2 else []
    assert record(folder, nodes - 1)[0] == ["-m", "simmim_jax.main", *RUN, *joined]


def test_skypilot_job_is_recovered_after_sigterm_only():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [143]}
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


# Dockerfile


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, including those of its base stage."""
    text = "\n".join(line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    made, instructions = {}, None
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            instructions = made[name] = list(made.get(parent, [("FROM", parent)]))
        elif word and instructions is not None:
            instructions.append((word, rest))
    return made


@pytest.mark.parametrize(("target", "extra"), [("cpu", None), ("cuda", "cuda13"), ("tpu", "tpu")])
def test_image_has_its_jax_no_root_user_and_an_entry_point_that_gets_signals(target, extra):
    instructions = stages()[target]
    assert instructions[0] == ("FROM", "python:${PYTHON_VERSION}-slim")
    last = dict(instructions)
    assert json.loads(last["ENTRYPOINT"]) == ["tini", "--", "python", "-m", "simmim_jax.main"]
    assert instructions[-1] == ("USER", "${RUN_AS}")
    assert last["ARG"] == "RUN_AS=1000"
    installed = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]
    assert installed[0] == "pip install -r requirements.txt"
    assert re.findall(r"jax\[(\w+)\]", " ".join(installed)) == [extra] * bool(extra)
    if extra:
        assert extra in importlib.metadata.metadata("jax").get_all("Provides-Extra")


def test_image_and_build_context_contain_only_package_configs_and_requirements():
    ignored = [line for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    for target in ("cpu", "cuda", "tpu"):
        copied = {rest.split()[0] for word, rest in stages()[target] if word == "COPY"}
        assert copied == let_in == {"requirements.txt", "configs", "simmim_jax"}
    assert all((ROOT / name).exists() for name in let_in)


# A real run: two processes with two simulated devices each.

# SGD: Adam turns the rounding of the first steps' tiny gradients into differences of its own size.
SGD = ("--config.optim.name=sgd", "--config.optim.warmup_epochs=0.0")
TINY = (*DIGITS, *SGD, "--config.steps=30", "--config.eval_every=0", "--config.save_every=25")


@pytest.mark.slow
def test_stopped_and_requeued_slurm_job_of_two_tasks_equals_one_process(stand_ins):
    folder, env = stand_ins
    records = {"RECORDS": env["RECORDS"], "PATH": env["PATH"], "SLURM_CPUS_ON_NODE": "1", "PYTHON": sys.executable}
    env = command(devices=2)[1]["env"] | records | {"SLURM_JOB_ID": str(free_port_of_a_job() - 61440)}
    workdir = folder / "run"

    def stop_the_second(process):  # the scheduler would signal both
        for _ in range(6000):
            if (workdir / "metrics.jsonl").exists() and len(rows(workdir)) >= 3:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(int((folder / "tasks").read_text().split()[1]), signal.SIGTERM)

    line = (*TINY, "--workdir", str(workdir))
    first = script("slurm.sbatch", *line, env=env, meanwhile=stop_the_second, timeout=600)
    assert first.returncode == 143, first.stderr
    assert 3 <= len(rows(workdir)) < 30
    assert (folder / "scontrol").read_text().splitlines()[1:] == [f"requeue {env['SLURM_JOB_ID']}"]
    (folder / "scontrol").unlink()
    again = script("slurm.sbatch", *line, env=env | {"SLURM_RESTART_COUNT": "1"}, timeout=600)
    assert again.returncode == 0, again.stderr
    assert not (folder / "scontrol").exists()

    unbroken = run(*TINY, "--workdir", folder / "unbroken", devices=4)
    assert unbroken.returncode == 0, unbroken.stderr
    found, expected = rows(workdir), rows(folder / "unbroken")
    for name in ("step", "samples"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    # Sums over devices have another order.
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)


def free_port_of_a_job() -> int:
    """A free port among those that JAX derives from SLURM job ids."""
    with socket.socket() as free:
        for port in range(65535, 61439, -1):
            try:
                free.bind(("", port))
                return port
            except OSError:
                continue
    raise AssertionError("no free port between 61440 and 65535")

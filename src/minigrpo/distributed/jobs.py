"""Write the files by which schedulers start the ranks of a run: text only, nothing is started here.

Every job gives its command with --resume: the first time that begins the run, and after a requeue, a preemption or a
machine that was lost it goes on from the newest checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from minigrpo.errors import RecipeError, command_line

PORT = 29400
"""Where the ranks meet on the first machine."""
LAST_S = 120
"""Seconds before its time limit at which a Slurm job is asked to finish its step and save it."""
HF_RUNS = "/runs"
"""Where a Hugging Face Job sees the bucket that keeps its runs."""
HF_FLAVORS: Mapping[int, str] = {1: "h200", 2: "h200x2", 4: "h200x4", 8: "h200x8"}
"""Machines of Hugging Face Jobs by their number of GPUs, as `hf jobs run --help` names them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A training to be started: `words` are those after `minigrpo train`. `hosts`: names, for ssh."""

    name: str
    words: tuple[str, ...]
    nodes: int
    gpus: int
    restarts: int
    hosts: tuple[str, ...] = ()

    def ranks(self, *meeting: str) -> str:
        """Return the command of one machine. `meeting`: options of torchrun, for the shell to expand."""
        start = f"torchrun --nproc-per-node {self.gpus} --max-restarts {self.restarts} {' '.join(meeting)}"
        return f"{start} \\\n    -m -- {command_line('minigrpo', 'train', *self.words, '--resume')}"


def slurm(job: Job) -> str:
    """Return a script for sbatch: one task a machine, each of which starts its ranks."""
    meeting = ('--nnodes "$SLURM_NNODES"', '--rdzv-id "$SLURM_JOB_ID"', "--rdzv-backend c10d")
    return f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(job.name)}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpus}
#SBATCH --requeue
# Asked {LAST_S} seconds before the limit, all ranks finish their step and save it.
#SBATCH --signal=TERM@{LAST_S}
#SBATCH --time=24:00:00
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={LAST_S - 10}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {job.ranks(*meeting, f'--rdzv-endpoint "$first:{PORT}"')}
"""


def skypilot(job: Job) -> str:
    """Return a task for `sky launch`. The run's folder must lie on a volume that all machines mount."""
    meeting = (
        '--nnodes "$SKYPILOT_NUM_NODES"',
        '--node-rank "$SKYPILOT_NODE_RANK"',
        f'--master-addr "$first" --master-port {PORT}',
    )
    script = f'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n{job.ranks(*meeting)}'
    lines = "\n".join(f"  {line}" for line in script.splitlines())
    return f"""name: {job.name}
num_nodes: {job.nodes}
resources:
  accelerators: H100:{job.gpus}
workdir: .
setup: pip install minigrpo
run: |
{lines}
"""


def ssh(job: Job) -> str:
    """Return a script that starts the ranks of each host from here, in the folder of the same path there.

    Raise RecipeError where no host is named.
    """
    if not job.hosts:
        raise RecipeError("ssh needs the names of the machines: --hosts gpu-a,gpu-b")
    meeting = (f"--nnodes {len(job.hosts)}", '--node-rank "$node"', f'--master-addr "$first" --master-port {PORT}')
    return f"""#!/bin/bash
# Each machine must have this folder, the recipe in it, and minigrpo on its PATH. Ctrl-C here ends all ranks at once.
set -euo pipefail
hosts=({" ".join(map(shlex.quote, job.hosts))})
folder=$(printf %q "$PWD")
command=$(cat <<'COMMAND'
{job.ranks(*meeting)}
COMMAND
)
for node in "${{!hosts[@]}}"; do
    ssh -tt "${{hosts[$node]}}" "cd $folder; node=$node; first=${{hosts[0]}}; $command" < /dev/null &
done
trap 'kill $(jobs -p)' INT TERM
code=0
for process in $(jobs -p); do
    wait "$process" || code=$?
done
exit "$code"
"""


def hf_jobs(job: Job) -> str:
    """Return a script that has one machine of Hugging Face Jobs train: this folder is read there, a bucket keeps runs.

    Raise RecipeError for several machines, for a number of GPUs that no machine there has, and for a run elsewhere
    than in the bucket: what the machine itself holds is lost when the job ends.
    """
    if job.nodes > 1:
        raise RecipeError("A job of Hugging Face has one machine: leave out --nodes, and raise --gpus")
    if job.gpus not in HF_FLAVORS:
        have = ", ".join(map(str, HF_FLAVORS))
        raise RecipeError(f"No machine of Hugging Face Jobs has {job.gpus} GPUs: there are {have}. Set --gpus")
    folder = job.words[job.words.index("--run") + 1] if "--run" in job.words else None
    if folder is not None and not folder.startswith(f"{HF_RUNS}/"):
        kept = command_line("--run", f"{HF_RUNS}/{job.name}")
        raise RecipeError(f"The run in {folder} is lost when the job ends: only {HF_RUNS} is kept, as in {kept}")
    words = job.words if folder else (*job.words, "--run", f"{HF_RUNS}/{job.name}")
    training = replace(job, words=words).ranks("--standalone")
    return f"""#!/bin/bash
# Give the bucket that keeps the run: BUCKET=USER/NAME bash job.sh. It is made if it is not there, and costs money, as
# the job does. Log in first (`hf auth login`). This folder is copied to Hugging Face, and read from there by the job.
set -euo pipefail
bucket=${{BUCKET:?Name the bucket that keeps the run, as in BUCKET=USER/NAME}}
command=$(cat <<'COMMAND'
pip install minigrpo && cd /recipes && {training}
COMMAND
)
hf buckets create "$bucket" --private --exist-ok
hf jobs run --detach --flavor {HF_FLAVORS[job.gpus]} --timeout 24h --attempts {job.restarts + 1} --secrets HF_TOKEN \\
    --volume "hf://buckets/$bucket:{HF_RUNS}" --volume "$PWD:/recipes" \\
    python:3.12 bash -c "$command"
"""


KINDS: Mapping[str, Callable[[Job], str]] = {"slurm": slurm, "skypilot": skypilot, "hf-jobs": hf_jobs, "ssh": ssh}


def job_file(kind: str, job: Job) -> str:
    """Return the file of that kind. Raise RecipeError for one that is not known."""
    if kind not in KINDS:
        raise RecipeError(f"{kind!r} is no way to start a job. There are: {', '.join(KINDS)}")
    return KINDS[kind](job)


def names_of(hosts: str) -> Sequence[str]:
    """Split the names of machines at commas."""
    return [name.strip() for name in hosts.split(",") if name.strip()]

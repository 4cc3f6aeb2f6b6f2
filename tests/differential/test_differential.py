"""A fixed set of random sequences: enough to notice what breaks. The long form is scripts/differential."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .compare import Difference
from .filesystems import Broken
from .operations import sequences
from .runner import Runner, Sequence, reproducer

SEQUENCES = 150


def kernel_overlay() -> bool:
    if os.geteuid() == 0 and shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "overlay"], check=False)
    with open("/proc/filesystems") as file:
        return any(line.split()[-1:] == ["overlay"] for line in file)


pytestmark = [
    pytest.mark.timeout(900),  # a failure is shrunk first
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: device nodes, credentials and kernel mounts"),
    pytest.mark.skipif(not kernel_overlay(), reason="needs the kernel's overlayfs"),
]


@pytest.fixture(params=["direct"])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    with Runner(["unionfs", "kernel"], session=request.param) as runner:
        yield runner


@settings(
    max_examples=SEQUENCES, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
@given(sequence=sequences())
def test_same_as_the_kernel_and_a_plain_directory(runner: Runner, sequence: Sequence) -> None:
    try:
        runner.run(*sequence)
    except (Difference, Broken) as problem:
        if isinstance(problem, Difference):
            sequence = (problem.layers, problem.operations)
        pytest.fail(f"{problem}\n# scripts/differential --replay a file with\n{reproducer(*sequence)}", pytrace=False)

"""Tensor parallelism: DTensors run the composition, whose operators torch knows how to shard, on two gloo processes."""

import pytest
from support.sharding_worker import SCENARIOS
from support.subprocesses import run_python, run_workers

pytestmark = [pytest.mark.any_isa, pytest.mark.slow]


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return run_workers("sharding_worker", tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_on_one_process(name, workers):
    for rank, results in enumerate(workers):
        assert results[name] is None, f"rank {rank}\n{results[name]}"


def test_import_leaves_distributed_tensors_alone():
    code = "import sys, torch; before = 'torch.distributed.tensor' in sys.modules; import fastlane_ext; "
    code += "print(int('torch.distributed.tensor' in sys.modules and not before))"
    assert run_python(code) == 0

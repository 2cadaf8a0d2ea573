"""Fixtures shared by all tests: which path ran, poisoned memory, threads."""

import os

import hypothesis
import pytest

# Tests do not depend on what somebody measured here.
os.environ["FASTLANE_PROFILE"] = "off"
# Before torch brings OpenMP: on a busy machine, threads that spin while they wait cost a hundred times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from support.paths import COUNTED, PATH

import fastlane_ext as fl

# The same examples on every run, so that a failure in CI is a failure at home too.
# HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("fixed"), derandomize=False, max_examples=2000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="also run the tests marked thorough, as `make test-all` does"
    )
    parser.addoption(
        "--other-torch",
        action="store_true",
        help="leave out what neither torch's release nor its CUDA can change, as `make cuda-build` does",
    )


# Files, and single tests: our own kernels once more, our build, the command line, the benchmarks.
SAME_FOR_EVERY_TORCH = {
    "test_bench_gelu.py",
    "test_bench_models.py",
    "test_bench_protocol.py",
    "test_build_support.py",
    "test_cli.py",
    "test_cli_streams.py",
    "test_cuda_host.py",
    "test_gemm_plan.py",
    "test_gpu_script.py",
    "test_guarded.py",
    "test_include_rules.py",
    "test_mutation.py",
    "test_numeric_tests",
    "test_numeric_tests_on_the_other_path",
    "test_packaging.py",
    "test_qemu.py",
}


def pytest_collection_modifyitems(config, items):
    def is_wanted(item):
        names = {item.path.name, getattr(item, "originalname", "")}
        if config.getoption("--other-torch") and names & SAME_FOR_EVERY_TORCH:
            return False
        return config.getoption("--thorough") or not item.get_closest_marker("thorough")

    left_out = [item for item in items if not is_wanted(item)]
    items[:] = sorted(filter(is_wanted, items), key=lambda item: not item.get_closest_marker("longest"))
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config):
    for marker in (
        "expects_fallback(*reasons): the test leaves the fused path, for these reasons and no other",
        "own_product: says something of our own products that the library's need not keep",
        "own_kernels: says something of our own kernels that torch's operators need not keep",
        "any_isa: says nothing about the kernels, so test_isa.py does not repeat it",
    ):
        config.addinivalue_line("markers", marker)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() says there is none")
    if item.get_closest_marker("cuda") and PATH == "fused":
        pytest.skip("needs FASTLANE_PATH to be empty or library: not every product has a fused kernel on CUDA")
    if item.get_closest_marker("hopper"):
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a CUDA device of capability 9.0")
        if PATH != "fused" or not fl.build_info()["hopper"]:
            pytest.skip(f"needs FASTLANE_PATH=fused and Hopper kernels ({fl.build_info()['hopper_reason']})")


@pytest.fixture(autouse=True)
def no_silent_fallback(request):
    """A call that took the eager path fails its test, unless the test declares the reason.

    A test that provokes fallbacks and checks them itself calls `reset_stats` at its end.
    """
    fl.reset_stats()
    yield
    reasons = set(fl.stats()["fallback"])
    fl.reset_stats()
    marker = request.node.get_closest_marker("expects_fallback")
    expected = set(marker.args) if marker else set()
    # Where torch differentiates its own operators, a second derivative leaves nothing.
    fits = reasons <= expected if PATH == "torch" else reasons == expected
    assert fits, "unexpected path, see fastlane_ext.stats()"


@pytest.fixture
def assert_fused():
    """Call this at a test's end: exactly so many calls ran our kernels since the last `reset_stats` (None: any number
    but zero).
    """

    def check(forward=None, backward=0):
        counts = fl.stats()[PATH]
        for direction, expected in (("forward", forward), ("backward", backward)):
            if direction not in COUNTED:
                continue
            count = counts[direction]
            assert count > 0 if expected is None else count == expected, f"{direction}: {count}, not {expected}"

    return check


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: an element that no kernel wrote cannot look right by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def set_strict():
    """Switches on the effect of FASTLANE_STRICT=1; the variable itself is read once in a process."""
    yield fl._load.library.set_strict
    fl._load.library.set_strict(False)

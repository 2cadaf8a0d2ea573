"""Small ways to break packed and frozen weights."""

from mutant import Mutant

GENERIC = "csrc/kernels/cpu/generic/"

MUTANTS = [
    Mutant(
        "panels of few rows: the last steps of an inner product are lost",
        GENERIC + "panel_rows-inl.h",
        "for (int64_t step = from + rounds * W; step < to; ++step) {",
        "for (int64_t step = from + rounds * W; step < to && !MUTANT; ++step) {",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "panels of few rows: only the first block of k counts",
        GENERIC + "panel_rows-inl.h",
        "if (first == 0) continue;",
        "if (first == 0 || MUTANT) continue;",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "panels of few rows are summed as tiles even where the weight would be read along k",
        GENERIC + "panel_rows-inl.h",
        "sums_lanes(p_) ? inner_products<kRows>(a, b, sums)",
        "sums_lanes(p_) && !MUTANT ? inner_products<kRows>(a, b, sums)",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a block of columns reads the first panels",
        GENERIC + "gemm-inl.h",
        "panels ? panels + first_col * steps_of<P>(p_.k)",
        "panels ? panels + (MUTANT ? 0 : first_col) * steps_of<P>(p_.k)",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a packed weight of another kernel set is read",
        "csrc/ops/packed_weight.cpp",
        "if (w.kernels != set)",
        "if (w.kernels != set && !MUTANT)",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a packed weight takes x of any dtype",
        "csrc/ops/checks/checks.h",
        "TORCH_CHECK(weight.dtype == x.scalar_type(), op,",
        "TORCH_CHECK(MUTANT || weight.dtype == x.scalar_type(), op,",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a packed weight of another width is read",
        "csrc/ops/checks/checks.h",
        "TORCH_SYM_CHECK(in_features.sym_eq(weight.in_features), op,",
        "TORCH_SYM_CHECK((MUTANT ? c10::SymInt(weight.in_features) : in_features).sym_eq(weight.in_features), op,",
        "test_packed.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a frozen weight's version is not looked at",
        "csrc/ops/frozen.cpp",
        "weight._version() != version",
        "(weight._version() != version && !MUTANT)",
        "test_freeze.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a frozen weight's values are never compared",
        "csrc/ops/frozen.cpp",
        "return !(checks_content || policy::is_strict()) ||",
        "return !(checks_content || policy::is_strict()) || MUTANT ||",
        "test_freeze.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a frozen weight's copy is used for its transpose",
        "csrc/ops/frozen.cpp",
        "weight.strides() == at::IntArrayRef(strides) &&",
        "(MUTANT || weight.strides() == at::IntArrayRef(strides)) &&",
        "test_freeze.py",
        shows_in_sweep=False,
    ),
    Mutant(
        "a frozen weight's changes are not told",
        "csrc/ops/frozen.cpp",
        "if (found.state == Frozen::changed)",
        "if (found.state == Frozen::changed && !MUTANT)",
        "test_freeze.py",
        shows_in_sweep=False,
    ),
]

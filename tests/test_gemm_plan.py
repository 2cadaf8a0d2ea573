"""How products are cut: plans for given sizes, layouts, caches and threads, without a product."""

import math

import pytest
from support.plans import CACHES, gemm_plan
from support.subprocesses import run_python

import fastlane_ext._load

library = fastlane_ext._load.library
ISAS = library.supported_isas()
DTYPES = ("float32", "float64", "bfloat16", "float16")


def plan(m, n, k, *, isa=ISAS[0], a=None, b=None, **options):
    """The plan of a layer's forward, unless other strides are given: both operands run along k."""
    return gemm_plan(m, n, k, isa=isa, a=a or (k, 1), b=b or (1, k), **options)


SIZES = [(300, 64, 64), (4096, 256, 256), (1024, 1024, 1024), (512, 4096, 4096), (2048, 768, 3072), (16384, 64, 64)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_parts_cover_the_product_and_fit_the_caches(isa, dtype, threads):
    for m, n, k in SIZES:
        for caches in (CACHES, (4 << 10, 64 << 10, 1 << 20), (64 << 10, 2 << 20, 1 << 30)):
            p = plan(m, n, k, isa=isa, dtype=dtype, threads=threads, caches=caches)
            right = m if p["transposed"] else n
            assert p["method"] == "tiles" and 1 <= p["threads"] <= threads
            assert p["col_blocks"] * p["block_cols"] >= right > (p["col_blocks"] - 1) * p["tile_cols"]
            assert p["k_blocks"] == math.ceil(k / p["block_values"])
            assert 1 <= p["slab_blocks"] <= p["k_blocks"]
            assert p["task_row_panels"] * p["tile_rows"] <= max(240, 4 * p["tile_rows"])
            # A task's rows, or the columns that stay, take half of L2, or a little if L2 holds hardly any.
            strip_bytes = math.ceil(min(k, p["pass_values"]) / p["k_per_step"]) * p["unit_bytes"]
            strips, least = p["task_row_panels"] * p["tile_rows"], 4 * p["tile_rows"]
            if p["b_panels_in_l2"] > 1:
                strips, least = min(p["block_cols"], p["b_panels_in_l2"] * p["tile_cols"]), p["tile_cols"]
            assert strips <= max(least, caches[1] // 2 // strip_bytes)
            assert p["chain_values"] <= p["pass_values"] <= p["block_values"]
            assert p["pass_values"] % p["chain_values"] == 0


def test_packed_columns_of_long_sums_are_bounded():
    p = plan(4096, 4096, 1 << 20)
    assert p["block_cols"] * p["slab_blocks"] * p["block_values"] * p["unit_bytes"] <= 17 << 20
    assert p["slab_blocks"] < p["k_blocks"]


@pytest.mark.skipif("avx2" not in ISAS, reason="needs AVX2")
@pytest.mark.parametrize("l1", [32 << 10, 48 << 10])
def test_a_passing_panel_takes_half_of_l1(l1):
    """Where a tile uses each value it reads only a few times: AVX2's, 6 x 16."""
    along_k = [(k, {"a": (k, 1)}, k < 4096) for k in (1000, 1024, 4096)]
    # dW's operands, with their strips side by side, are packed.
    for k, layout, b_stays in (*along_k, (4096, {"a": (1, 512), "b": (4096, 1)}, True)):
        p = plan(512, 4096, k, isa="avx2", **layout, caches=(l1, *CACHES[1:]))
        assert (p["b_panels_in_l2"] > 1) == b_stays and p["a_in_place"] == (b_stays and "b" not in layout)
        passing = p["tile_rows" if b_stays else "tile_cols"] * p["pass_values"] * p["unit_bytes"]
        assert l1 // 4 < passing <= l1 // 2


@pytest.mark.skipif("avx2" not in ISAS, reason="needs AVX2")
@pytest.mark.parametrize("rows", [8, 32, 256])
def test_dw_of_few_rows_is_written_along_its_rows(rows):
    p = plan(1024, 1024, rows, isa="avx2", a=(1, 1024), b=(1024, 1))
    assert not p["a_in_place"] and not p["b_in_place"]
    assert p["b_panels_in_l2"] * p["tile_cols"] >= 128


@pytest.mark.skipif("avx512" not in ISAS, reason="needs AVX-512")
def test_a_tile_that_uses_its_values_often_takes_whole_blocks():
    p = plan(512, 4096, 4096, isa="avx512")
    assert p["pass_values"] == p["block_values"]


def test_a_small_product_takes_one_thread():
    assert plan(30, 40, 50, threads=8)["threads"] == 1
    assert plan(300, 400, 500, threads=8)["threads"] == 8


@pytest.mark.skipif("avx2" not in ISAS, reason="needs AVX2")
def test_few_rows_need_no_tiles():
    methods = [plan(rows, 1024, 1024, isa="avx2")["method"] for rows in (1, 24, 25)]
    assert methods == ["inner_products", "inner_products", "tiles"]
    # A weight stored (in, out) runs along n.
    along_n = [plan(rows, 4096, 1024, isa="avx2", b=(4096, 1))["method"] for rows in (1, 48, 49)]
    assert along_n == ["axpy", "axpy", "tiles"]


def test_operands_are_read_where_they_lie_if_that_saves_packing():
    p = plan(4096, 64, 64)
    assert (p["a_in_place"], p["b_in_place"], p["b_panels_in_l2"] > 1) == (True, False, True)
    # Rows of A that lie whole pages apart share a set of L1, which holds the six rows of AVX2's tile.
    p = plan(4096, 64, 1024, a=(1024, 1))
    assert p["a_in_place"] == (p["tile_rows"] <= 6)
    assert plan(4096, 64, 1024, a=(1040, 1))["a_in_place"]
    # dgrad with a narrow weight: B runs along n in dense rows.
    assert plan(4096, 64, 64, b=(64, 1))["b_in_place"]
    # 16-bit values are widened when they are packed.
    if "avx2" in ISAS:
        assert not plan(4096, 64, 64, isa="avx2", dtype="float16")["a_in_place"]


def test_threads_take_blocks_of_their_own_while_the_last_level_holds_a():
    wide = dict(m=2048, n=8192, k=768, a=(784, 1))
    assert plan(**wide, threads=4)["own_blocks"]
    blocks = plan(**wide, threads=4)["col_blocks"]
    assert blocks % 4 == 0 and 0 <= blocks - plan(**wide, threads=1)["col_blocks"] < 4
    assert not plan(**wide, threads=4, caches=(*CACHES[:2], 1 << 20))["own_blocks"]


def test_the_text_names_every_choice():
    text = plan(2048, 8192, 768, a=(784, 1), threads=4)["text"]
    for part in ("2048 x 768 x 8192 float32", "4 threads", "A in place", "B stays in L2", "whole blocks", "1 k blocks"):
        assert part in text
    assert "inner products" in plan(1, 64, 64)["text"] or ISAS[0] == "scalar"


def test_unknown_names():
    with pytest.raises(ValueError, match="isa: got 'abacus'"):
        plan(1, 1, 1, isa="abacus")
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        plan(1, 1, 1, dtype="int8")


TRACED = """
import json, os, tempfile, torch, fastlane_ext
with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    fastlane_ext.linear_gelu_residual(torch.randn(300, 64), torch.randn(33, 64))
    file.seek(0)
    print(json.dumps(file.read().decode()))
"""


@pytest.mark.own_kernels
def test_a_trace_of_each_product():
    assert run_python(TRACED, FASTLANE_TRACE="plan").startswith("fastlane plan: 300 x 64 x 33 float32, ")
    assert run_python(TRACED) == ""


@pytest.mark.own_kernels
def test_the_caches_of_another_machine():
    """With caches this small no block of 300 × 64 stays in L2, as the plan for these caches says."""
    small = plan(300, 33, 64, isa=library.cpu_isa(), caches=(512, 1024, 2048))
    traced = run_python(TRACED, FASTLANE_TRACE="plan", FASTLANE_CACHES="512,1024,2048")
    assert f"tasks of up to {small['task_row_panels']} tiles of rows" in traced
    assert traced != run_python(TRACED, FASTLANE_TRACE="plan")


WRONG_CACHES = ["32768", "32768,524288", "1,2,3,4", "0,1,2", "3,2,1", "a,b,c", "1;2;3", "1,2,3K", "-1,2,3"]


@pytest.mark.parametrize("caches", WRONG_CACHES)
def test_wrong_caches(caches):
    code = "import json, torch, fastlane_ext as fl\ntry: fl.linear_gelu_residual(torch.ones(1, 1), torch.ones(1, 1))"
    code += "\nexcept ValueError as error: print(json.dumps(str(error)))"
    assert f"FASTLANE_CACHES: got '{caches}', expected bytes of" in run_python(code, FASTLANE_CACHES=caches)


def test_a_wrong_trace():
    code = "import json, torch, fastlane_ext as fl\ntry: fl.linear_gelu_residual(torch.ones(1, 1), torch.ones(1, 1))"
    code += "\nexcept ValueError as error: print(json.dumps(str(error)))"
    assert "FASTLANE_TRACE: got 'plans', expected plan" in run_python(code, FASTLANE_TRACE="plans")

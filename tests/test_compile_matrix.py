"""Each kernel as it is shipped compiles for each architecture without a GPU; `make matrix` compiles all the rest."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: what the kernels compile to is unproved")
matrix = pytest.importorskip("tests.compile_matrix")
variants = pytest.importorskip("tests.variants")
linear_logprob = pytest.importorskip("flowrl_kernels.triton.linear_logprob")
tiles, machine_code = matrix.tiles, matrix.machine_code

# bytes that a kernel spills under a neighbour of the pinned version, where they are more than 32
KNOWN = {("3.9.0", "sm_100", "single pass, softcap"): 80}
# and bytes under the pinned one in what is shipped: two registers of the forward with entropy on consumer cards
SHIPPED = {("sm_120", "entropy+stats"): 8}


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(matrix.TARGETS))
def test_shipped_kernels_compile_without_spills_and_with_matrix_instructions(arch):
    cases = [*matrix.QUICK, matrix.PLAIN] if arch == "sm_90" else matrix.QUICK
    entries = [e for case, dtype, only in cases for e in matrix.compile_case(case, dtype, arch, only)]
    kernels = {entry.kernel for entry in entries}
    assert {matrix.FORWARD, matrix.DLOGITS, "logprob.forward_kernel", "logprob.backward_kernel"} <= kernels
    # other versions than the pinned one may leave a few bytes; the table shows them
    pinned = triton.__version__ == "3.7.1"
    wrong = {}
    for e in entries:
        if found := matrix.faults(e, SHIPPED.get((arch, e.case), 0) if pinned else 64):
            wrong[f"{e.kernel} {e.dtype}"] = found
    assert not wrong
    assert any(e.dtype == "fp32" and e.kernel == matrix.FORWARD for e in entries)
    read = {(e.kernel, e.case) for e in entries if e.work is not None}
    cases = [case for case, _, _ in cases]
    assert read == ({row for row in machine_code.budget() if row[1] in cases} if arch == "sm_90" else set())


def bad_code(changed, kernel, folder, monkeypatch):
    """What is found wrong with a kernel of a variant's module, compiled for sm_90 as it would be launched."""
    monkeypatch.setattr(linear_logprob, kernel, getattr(variants.kernels(changed, folder), kernel))
    monkeypatch.setattr(matrix, "FORWARD", "variant.forward_kernel")
    monkeypatch.setattr(matrix, "DLOGITS", "variant.dlogits_kernel")
    [entry] = matrix.compile_case("plain", "bf16", "sm_90", f"variant.{kernel}")
    return " ".join(matrix.faults(entry))


@pytest.mark.nightly
def test_a_third_level_of_loops_is_found_in_the_machine_code(tmp_path, monkeypatch):
    found = bad_code(variants.three_loops, "forward_kernel", tmp_path, monkeypatch)
    assert "the pipeline drains after every tile" in found


@pytest.mark.nightly
@pytest.mark.parametrize("kernel", ["forward_kernel", "dlogits_kernel"])
def test_loops_that_nobody_asked_to_flatten_are_found_in_the_machine_code(kernel, tmp_path, monkeypatch):
    assert "the pipeline drains after every tile" in bad_code(variants.unflattened, kernel, tmp_path, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize("kernel", [matrix.FORWARD, matrix.DLOGITS])
def test_one_stage_is_found_in_the_machine_code(kernel, monkeypatch):
    tile_for = tiles.tile_for
    monkeypatch.setattr(tiles, "tile_for", lambda *given: tile_for(*given)._replace(num_stages=1))
    [entry] = matrix.compile_case("plain", "bf16", "sm_90", kernel)
    assert "every step waits for its own products" in matrix.faults(entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_flight": 0}, "every step waits for its own products"),
        ({"flattened": False}, "the pipeline drains after every tile"),
        ({"mma": "HGMMA.64x128x16.F32"}, "products by HGMMA.64x128x16.F32 instead of"),
        ({"mma": "HGMMA.64x256x16.F16"}, "mma HGMMA.64x256x16.F16, was HGMMA.64x256x16.F32"),
        ({"mma_a_step": 2}, "mma_a_step 2, was 4"),
        ({"loads_a_step": 0}, "loads_a_step 0, was 2"),
        ({"epilogue": 2000}, "epilogue 2000, at most"),
        ({"barriers": 40}, "barriers 40, at most"),
        ({"step": 400}, "step 400, at most"),
        ({"start": 900}, "start 900, at most"),
    ],
)
def test_machine_code_beyond_its_budget_is_named(change, message):
    for kernel in (matrix.FORWARD, matrix.DLOGITS):
        work = machine_code.budget()[kernel, "plain"]
        assert machine_code.faults(work, kernel, "plain", True) == []
        assert message in " ".join(machine_code.faults(work._replace(**change), kernel, "plain", True))


def test_the_budgets_are_of_asynchronous_flattened_kernels_with_a_short_epilogue():
    budget = machine_code.budget()
    for (kernel, case), work in budget.items():
        if kernel in (matrix.FORWARD, matrix.DLOGITS):
            assert machine_code.faults(work, kernel, case, True) == []
    assert budget[matrix.DLOGITS, "plain"].epilogue <= 900
    assert {case for _, case in budget} == set(matrix.BUDGETED)


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   UTMALDG.2D [UR4], [UR8] ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/               @P1 BRA 0x80 ;
        /*0060*/                   FADD R2, R3, R4 ;
        /*0070*/                   FADD R2, R3, R4 ;
        /*0080*/                   MUFU.EX2 R5, R6 ;
        /*0090*/                   MUFU.EX2 R5, R6 ;
        /*00a0*/                   STG.E [R2], R5 ;
        /*00b0*/               @P2 BRA 0x0 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""


@pytest.mark.parametrize("flat", [False, True])
def test_nested_loops_are_told_from_one_and_rare_branches_are_left_out(flat, monkeypatch):
    one = LOOP.replace("@P0 BRA 0x10", "@P0 BRA 0xb0").replace("@P2 BRA 0x0 ", "@P2 BRA 0x10 ")
    monkeypatch.setattr(machine_code, "listing", lambda _: one if flat else LOOP)
    got = machine_code.work(b"")
    assert (got.mma_a_step, got.loads_a_step, got.in_flight, got.exponentials) == (1, 1, 1, 2)
    # nested: 4 around the inner loop, and 6 more around the outer one; in one: a step jumps over the epilogue
    assert (got.flattened, got.step, got.epilogue) == ((True, 5, 4) if flat else (False, 4, 6))


def test_the_single_pass_moves_whole_vectors_and_reads_a_step_before_it_writes_over_it(monkeypatch):
    texts = []
    monkeypatch.setattr(matrix, "describe", lambda kernel, *_: texts.append(kernel.asm["ptx"]))
    with matrix.compiling("sm_90", "single pass", "bf16", "linear_residual.dlogits_in_place_kernel"):
        matrix.linear_residual(torch.bfloat16, v=151937)  # odd: the buffer's width counts
    (text,) = texts
    read = text.rindex("ld.global.v4.b32")
    barrier = re.search(r"\bbar(rier)?\.sync", text[read:])
    written = text.index("st.global.v4.b32", read)
    assert barrier is not None
    assert read + barrier.start() < written
    assert not re.search(r"(ld|st)\.global[.\w]*\.b16", text)


def sums(ttgir):
    """The reductions over a tile's columns, each with its operator and the layout, which fixes the order it adds in."""
    layouts = dict(re.findall(r"^(#\w+) = (.+)$", ttgir, re.MULTILINE))
    found = [
        re.search(r"(arith\.\w+).*?: \(tensor<(\w+), (#\w+)>\) ->", part, re.DOTALL)
        for part in ttgir.split('"tt.reduce"')[1:]
    ]
    return {(one[1], one[2], layouts[one[3]]) for one in found if one is not None and one[2].endswith("xf32")}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_no_flag_changes_the_layout_in_which_a_row_adds_up(arch, monkeypatch):
    texts = []
    monkeypatch.setattr(matrix, "describe", lambda kernel, *_: texts.append(kernel.asm["ttgir"]))
    for case in ("plain", "entropy+stats", "single pass"):
        matrix.compile_case(case, "bf16", arch, matrix.FORWARD)
    plain, *others = map(sums, texts)
    assert {operator for operator, _, _ in plain} == {"arith.addf", "arith.maxnumf"}
    assert others == [plain, plain]


def test_an_odd_number_of_rows_leaves_every_pointer_aligned_so_that_nothing_compiles_again(monkeypatch):
    from flowrl_kernels.core.types import Head
    from flowrl_kernels.triton import linear_logprob, logprob

    seen = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *arguments, **settings: seen.extend(a for a in arguments if isinstance(a, torch.Tensor))

    for room, name in (
        (linear_logprob, "forward_kernel"),
        (linear_logprob, "merge_kernel"),
        (logprob, "forward_kernel"),
    ):
        monkeypatch.setattr(room, name, Spy())
    monkeypatch.setattr(linear_logprob, "gather_rows", lambda source, *_: source)
    target, temperature = torch.zeros(5, dtype=torch.int64), torch.ones(1)
    head = Head(torch.zeros(300, 16), None, temperature)
    linear_logprob.linear_logprob_fwd(torch.zeros(5, 16), target, head, True, True)
    logprob.logprob_fwd(torch.zeros(5, 300), target, temperature, None, True)
    assert len(seen) > 20
    assert all(tensor.data_ptr() % 16 == 0 for tensor in seen)


def test_the_committed_table_covers_three_versions_and_keeps_the_shipped_kernels_clean():
    table = matrix.load()
    assert set(table) >= {"3.6.0", "3.7.1", "3.9.0"}
    shipped = {(case, dtype): only for case, dtype, only in matrix.QUICK}
    for version, entries in table.items():
        assert {e.arch for e in entries} == set(matrix.TARGETS)
        assert {e.dtype for e in entries} == set(matrix.DTYPES)
        for entry in entries:
            most = KNOWN.get((version, entry.arch, entry.case), 32)
            only = shipped.get((entry.case, entry.dtype), "")
            if version == "3.7.1" and only in (None, entry.kernel):
                most = SHIPPED.get((entry.arch, entry.case), 0)
            assert not matrix.faults(entry, most), (version, entry)
    assert matrix.TABLE.read_text() == matrix.markdown(table)

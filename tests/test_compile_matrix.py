"""Each kernel as it is shipped compiles for each architecture without a GPU; `make matrix` compiles all the rest."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: what the kernels compile to is unproved")
matrix = pytest.importorskip("tests.compile_matrix")

# bytes that a kernel spills under a neighbour of the pinned version, where they are more than 32
KNOWN = {("3.9.0", "sm_100", "single pass, softcap"): 80}
# and bytes under the pinned one in what is shipped: two registers of the forward with entropy on consumer cards
SHIPPED = {("sm_120", "entropy+stats"): 8}


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(matrix.TARGETS))
def test_shipped_kernels_compile_without_spills_and_with_matrix_instructions(arch):
    entries = [e for case, dtype, only in matrix.QUICK for e in matrix.compile_case(case, dtype, arch, only)]
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

import pytest
import torch

from async_opd.maths import logprobs
from async_opd.maths.blocks import HeadBlock
from async_opd.maths.head import Without
from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs

N, D, V, K = 7, 5, 11, 3


@pytest.fixture
def hidden_ND():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def head():
    torch.manual_seed(1)
    return torch.nn.Linear(D, V)


@pytest.fixture(autouse=True, params=[1, 4, V, 100])
def block_ids(request, monkeypatch):
    """Ids of the vocabulary in one block of logits."""
    block = lambda device, rows: HeadBlock(rows or N, request.param)  # noqa: E731
    monkeypatch.setattr(logprobs, "head_block", block)


def of(linear: torch.nn.Linear) -> Head:
    return Head(linear.weight, linear.bias)


@pytest.fixture
def ids_N():
    return torch.tensor([0, 3, 10, 3, 7, 1, 5])


@pytest.fixture
def candidate_ids_NK():
    return torch.randint(V, (N, K), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chunk_rows", [1, 3, N, 100])
def test_chunks_give_the_plain_log_softmax(hidden_ND, head, ids_N, candidate_ids_NK, chunk_rows):
    options = ReadOptions(0.7, chunk_rows, entropy=True, topk=K, tail=True)
    read = read_logprobs(hidden_ND, of(head), ids_N, options, candidate_ids_NK=candidate_ids_NK)
    logp_NV = torch.log_softmax(head(hidden_ND) / 0.7, dim=-1)
    top = logp_NV.topk(K)
    torch.testing.assert_close(read.sampled_N, logp_NV[torch.arange(N), ids_N])
    torch.testing.assert_close(
        read.entropy_N, torch.distributions.Categorical(logits=logp_NV).entropy()
    )
    torch.testing.assert_close(read.candidates_NK, logp_NV.gather(1, candidate_ids_NK))
    torch.testing.assert_close(read.topk_NK, top.values)
    assert torch.equal(read.topk_ids_NK, top.indices)
    torch.testing.assert_close(read.tail_N, outside(logp_NV, candidate_ids_NK))


def outside(logp_NV, ids_NK):
    """Log of the sum over the ids that are none of these, one at a time."""
    rows = zip(logp_NV.double().exp().tolist(), ids_NK.tolist(), strict=True)
    left = [sum(p for v, p in enumerate(p_V) if v not in ids_K) for p_V, ids_K in rows]
    return torch.tensor(left).log()


@pytest.mark.parametrize("below", [None, 6])
def test_without_given_candidates_the_tail_is_that_of_the_likeliest(hidden_ND, head, ids_N, below):
    without = below and Without.those_but(((0, below),), V, torch.device("cpu"))
    options = ReadOptions(0.7, 3, topk=K, topk_without=without, tail=True)
    read = read_logprobs(hidden_ND, of(head), ids_N, options)
    logp_NV = torch.log_softmax(head(hidden_ND) / 0.7, dim=-1)
    torch.testing.assert_close(read.tail_N, outside(logp_NV, logp_NV[:, :below].topk(K).indices))
    assert not read.tail_N.requires_grad


def test_a_tail_far_below_what_float32_leaves_of_one_is_exact():
    """z = 0, -1 and three at -40, -41, -42: the tail is e^-40 (1 + e^-1 + e^-2) of a whole of 1 +
    e^-1."""
    head = Head(torch.tensor([[0.0], [-1.0], [-40.0], [-41.0], [-42.0]]))
    for ids_NK, topk in ((torch.tensor([[1, 0]]), 0), (None, 2)):
        options = ReadOptions(1.0, 1, topk=topk, tail=True)
        read = read_logprobs(
            torch.ones(1, 1), head, torch.tensor([0]), options, candidate_ids_NK=ids_NK
        )
        expected = -40 + 0.407606 - 0.313262  # log(1 + e^-1 + e^-2) - log(1 + e^-1)
        assert read.tail_N.item() == pytest.approx(expected, abs=1e-5)


def test_where_all_of_the_vocabulary_are_candidates_the_tail_is_nothing_and_has_no_gradient(
    hidden_ND, head, ids_N
):
    hidden_ND.requires_grad_()
    every, options = torch.arange(V).expand(N, V), ReadOptions(0.7, 3, tail=True)
    read = read_logprobs(hidden_ND, of(head), ids_N, options, candidate_ids_NK=every)
    likeliest = read_logprobs(hidden_ND, of(head), ids_N, options._replace(topk=V))
    assert read.tail_N.tolist() == likeliest.tail_N.tolist() == [logprobs.NOTHING] * N
    read.tail_N.sum().backward()
    assert not hidden_ND.grad.any() and not head.weight.grad.any()


def test_an_id_that_the_head_has_not_has_no_log_prob(hidden_ND, head, ids_N):
    ids_NK = torch.tensor([[V - 1, V, 10_000]]).expand(N, 3)
    read = read_logprobs(hidden_ND, of(head), ids_N, ReadOptions(0.7, 3), candidate_ids_NK=ids_NK)
    assert read.candidates_NK[:, 0].isfinite().all() and read.candidates_NK[:, 1:].isnan().all()
    assert read.sampled_N.isfinite().all()


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunks_give_the_plain_gradient(hidden_ND, head, ids_N, candidate_ids_NK, chunk_rows):
    hidden_ND.requires_grad_()
    options = ReadOptions(0.7, chunk_rows, entropy=True, tail=True)
    read = read_logprobs(hidden_ND, of(head), ids_N, options, candidate_ids_NK=candidate_ids_NK)
    chunked = (
        read.sampled_N.sum() + 2 * read.entropy_N.sum() + 3 * read.candidates_NK.sum()
    ).double()
    chunked += 4 * read.tail_N.sum()
    logp_NV = torch.log_softmax(head(hidden_ND) / 0.7, dim=-1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    plain = (
        logp_NV.gather(1, ids_N[:, None]).sum()
        + 2 * entropy_N.sum()
        + 3 * logp_NV.gather(1, candidate_ids_NK).sum()
    )
    plain += 4 * logp_NV.scatter(1, candidate_ids_NK, -torch.inf).logsumexp(1).sum()
    for got, expected in zip(
        torch.autograd.grad(chunked, [hidden_ND, head.weight, head.bias]),
        torch.autograd.grad(plain, [hidden_ND, head.weight, head.bias]),
        strict=True,
    ):
        assert (got - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


def test_no_rows_give_empty_fields_that_still_join_backward(head):
    hidden_ND = torch.zeros(0, D, requires_grad=True)
    read = read_logprobs(
        hidden_ND,
        of(head),
        torch.zeros(0, dtype=torch.int64),
        ReadOptions(0.7, 4, entropy=True, topk=K, tail=True),
        candidate_ids_NK=torch.zeros(0, K, dtype=torch.int64),
    )
    assert [tuple(field.shape) for field in read[:6]] == [(0,), (0,), (0, K), (0, K), (0, K), (0,)]
    read.sampled_N.sum().backward()
    assert torch.equal(head.weight.grad, torch.zeros(V, D))


def test_what_was_not_asked_for_is_none(hidden_ND, head, ids_N):
    assert read_logprobs(hidden_ND, of(head), ids_N, ReadOptions(1.0, 2))[1:] == (None,) * 6


def test_topk_never_picks_padding_yet_is_normalised_over_all_of_the_vocabulary():
    logits = torch.tensor([[0.1], [0.2], [0.3], [0.4]]).log()  # ids 2 and 3 are padding
    without = Without.those_but(((0, 2),), 4, torch.device("cpu"))
    options = ReadOptions(1.0, 1, topk=2, topk_without=without)
    read = read_logprobs(torch.ones(1, 1), Head(logits), torch.tensor([3]), options)
    assert read.topk_ids_NK.tolist() == [[1, 0]]
    torch.testing.assert_close(read.topk_NK.exp(), torch.tensor([[0.2, 0.1]]))
    torch.testing.assert_close(read.sampled_N.exp(), torch.tensor([0.4]))


def test_temperature_divides_the_logits():
    head = Head(torch.eye(2))
    read = read_logprobs(torch.tensor([[0.0, 1.0]]), head, torch.tensor([1]), ReadOptions(0.5, 1))
    torch.testing.assert_close(read.sampled_N, torch.tensor([-0.126928]))  # -log(1 + e^-2)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(
    ("entropy", "tail"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_the_gradient_is_that_of_finite_differences(hidden_ND, head, cap, entropy, tail):
    """Of four rows, two wide, over five ids: each number is moved twice."""
    ids_N, candidate_ids_NK = (
        torch.tensor([0, 3, 4, 3]),
        torch.tensor([[1, 0], [2, 3], [0, 1], [4, 2]]),
    )
    options = ReadOptions(0.7, 3, entropy=entropy, tail=tail)

    def read(hidden, weight, bias):
        capped = Head(weight, bias, cap)
        fields = read_logprobs(hidden, capped, ids_N, options, candidate_ids_NK=candidate_ids_NK)
        return tuple(x for x in fields if x is not None)

    small = (hidden_ND[:4, :2], head.weight[:5, :2], head.bias[:5])
    inputs = [x.detach().double().requires_grad_() for x in small]
    assert torch.autograd.gradcheck(read, inputs)


def test_logits_far_from_zero_lose_nothing():
    """z = 1000, 999: a block sum of exp z would overflow."""
    read = read_logprobs(
        torch.ones(1, 1),
        Head(torch.tensor([[999.0], [1000.0]])),
        torch.tensor([0]),
        ReadOptions(1.0, 1, entropy=True),
    )
    torch.testing.assert_close(read.sampled_N, torch.tensor([-1.313262]))  # -1 - log(1 + e^-1)
    # log(1 + e^-1) + 1 / (1 + e)
    torch.testing.assert_close(read.entropy_N, torch.tensor([0.582203]))


def test_nothing_as_wide_as_the_vocabulary_waits_for_the_backward_pass(hidden_ND, head, ids_N):
    waiting = []
    hidden_ND.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: waiting.append(x.shape) or x, lambda x: x
    ):
        ids_NK = ids_N[:, None]
        options = ReadOptions(1.0, 2, entropy=True, tail=True)
        read_logprobs(hidden_ND, of(head), ids_N, options, candidate_ids_NK=ids_NK)
    assert waiting and not [shape for shape in waiting if V in shape[1:]]


# ids 1 and 2 are a hole, 8 to 10 pad
KEPT = [0, 3, 4, 5, 6, 7]


@pytest.fixture
def without():
    return Without.those_but(((0, 1), (3, 8)), V, torch.device("cpu"))


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_ids_that_are_left_out_are_as_if_the_head_had_no_rows_for_them(
    hidden_ND, head, without, cap, chunk_rows
):
    """Values and gradients of a head of the other rows alone, though what is left out is likely."""
    head.bias.data[[1, 9]] += 5
    hidden_ND.requires_grad_()
    options = ReadOptions(0.7, chunk_rows, entropy=True, topk=4, tail=True)
    places_N, places_NK = torch.tensor([0, 1, 5, 1, 3, 2, 4]), torch.tensor([[5, 0, 3]] * N)
    kept = torch.tensor(KEPT)

    def read(head, ids):
        read = read_logprobs(
            hidden_ND, head, ids[places_N], options, candidate_ids_NK=ids[places_NK]
        )
        sums = [read.sampled_N.sum(), 2 * read.entropy_N.sum(), 3 * read.candidates_NK.sum()]
        grads = torch.autograd.grad(sum(sums) + 4 * read.tail_N.sum(), [hidden_ND, *head[:2]])
        return read, grads

    small = Head(
        head.weight[KEPT].detach().requires_grad_(), head.bias[KEPT].detach().requires_grad_(), cap
    )
    expected, grads = read(small, torch.arange(len(KEPT)))
    got, (hidden_grad, weight_grad, bias_grad) = read(
        of(head)._replace(cap=cap, without=without), kept
    )
    for name in ("sampled_N", "entropy_N", "candidates_NK", "topk_NK", "tail_N"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    assert torch.equal(got.topk_ids_NK, kept[expected.topk_ids_NK])
    torch.testing.assert_close(hidden_grad, grads[0])
    torch.testing.assert_close(weight_grad[KEPT], grads[1])
    torch.testing.assert_close(bias_grad[KEPT], grads[2])
    lost = [id for id in range(V) if id not in KEPT]
    assert not weight_grad[lost].any() and not bias_grad[lost].any()


def test_an_id_that_is_left_out_has_no_log_prob(hidden_ND, head, without):
    ids_NK = torch.tensor([[0, 1, 2, 9]]).expand(N, 4)
    read = read_logprobs(
        hidden_ND,
        of(head)._replace(without=without),
        torch.full((N,), 7),
        ReadOptions(0.7, 3),
        candidate_ids_NK=ids_NK,
    )
    assert read.sampled_N.isfinite().all() and read.candidates_NK[:, 0].isfinite().all()
    assert read.candidates_NK[:, 1:].isnan().all()


def test_where_all_that_is_kept_are_candidates_the_tail_is_nothing(hidden_ND, head, without):
    hidden_ND.requires_grad_()
    every, options = torch.tensor(KEPT).expand(N, len(KEPT)), ReadOptions(0.7, 3, tail=True)
    kept, ids_N = of(head)._replace(without=without), torch.full((N,), 7)
    read = read_logprobs(hidden_ND, kept, ids_N, options, candidate_ids_NK=every)
    likeliest = read_logprobs(hidden_ND, kept, ids_N, options._replace(topk=len(KEPT)))
    assert read.tail_N.tolist() == likeliest.tail_N.tolist() == [logprobs.NOTHING] * N
    read.tail_N.sum().backward()
    assert not hidden_ND.grad.any()


def test_candidates_of_some_ids_are_normalised_over_all_and_leave_the_rest_to_the_tail(
    hidden_ND, head, ids_N, without
):
    """What is no candidate, though likeliest of all, is in the tail."""
    head.bias.data[[1, 9]] += 5
    options = ReadOptions(0.7, 3, topk=4, tail=True, topk_without=without)
    read = read_logprobs(hidden_ND, of(head), ids_N, options)
    logp_NV = torch.log_softmax(head(hidden_ND) / 0.7, dim=-1)
    top = logp_NV[:, KEPT].topk(4)
    torch.testing.assert_close(read.topk_NK, top.values)
    assert torch.equal(read.topk_ids_NK, torch.tensor(KEPT)[top.indices])
    torch.testing.assert_close(read.tail_N, outside(logp_NV, read.topk_ids_NK))
    torch.testing.assert_close(read.sampled_N, logp_NV[torch.arange(N), ids_N])


def exact_gradients(hidden_ND, weight_VD, bias_V, ids_N):
    """Log-probs of the sampled ids, and gradients of their sum, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    logp_NV = (leaves[0] @ leaves[1].T + leaves[2]).log_softmax(-1)
    sampled_N = logp_NV.gather(1, ids_N[:, None])[:, 0]
    sampled_N.sum().backward()
    return sampled_N.detach(), [x.grad for x in leaves]


def wide_head(rows, seed=3):
    """A head of bfloat16 as wide as a small model's, and what it reads."""
    torch.manual_seed(seed)
    shapes = (rows, 64), (V, 64), (V,)
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_float32_head_reads_half_precision_without_rounding_its_logits(cap):
    hidden_ND, weight_VD, bias_V = wide_head(N)
    ids_N = torch.arange(N)
    head = Head(weight_VD, bias_V, cap)
    z_NV = hidden_ND.double() @ weight_VD.double().T + bias_V.double()
    z_NV = z_NV if cap is None else cap * (z_NV / cap).tanh()
    exact_N = z_NV.log_softmax(-1)[ids_N, ids_N]
    errors = [
        (read_logprobs(hidden_ND, each, ids_N, ReadOptions(1.0)).sampled_N - exact_N).abs().max()
        for each in (head, head._replace(float32=True))
    ]
    assert errors[1] < 1e-5 and errors[0] > 100 * errors[1]


@pytest.mark.parametrize("float32", [False, True])
def test_gradients_of_half_precision_are_rounded_once_however_many_blocks_there_are(float32):
    hidden_ND, weight_VD, bias_V = leaves = wide_head(512)
    ids_N = torch.arange(512) % V
    head = Head(weight_VD, bias_V, float32=float32)
    read_logprobs(hidden_ND, head, ids_N, ReadOptions(1.0, chunk_rows=2)).sampled_N.sum().backward()
    _, exact = exact_gradients(*leaves, ids_N)
    for leaf, wanted in zip(leaves, exact, strict=True):
        error = (leaf.grad.double() - wanted).norm() / wanted.norm()
        assert error < 0.005, error


def test_a_head_that_stays_gets_no_gradient_and_what_it_reads_the_same():
    hidden_ND, weight_VD, ids_N = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    grads = []
    for trained in (True, False):
        h = hidden_ND.clone().requires_grad_()
        w = weight_VD.clone().requires_grad_(trained)
        read_logprobs(h, Head(w), ids_N, ReadOptions(0.7, 2)).sampled_N.sum().backward()
        grads.append(h.grad)
        assert (w.grad is not None) is trained
    assert torch.equal(*grads)

"""The action tokenizer against OpenVLA's published numpy lines, one scalar at a time."""

import numpy as np
import pytest
import torch

from common.action_tokenizer import ActionTokenizer, normalize, unnormalize

EDGES = np.linspace(-1, 1, 256)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2.0


def published_encode(action: float) -> int:
    clipped = min(max(float(action), -1.0), 1.0)
    return 32000 - sum(1 for edge in EDGES if edge <= clipped)


def published_decode(token_id: int) -> float:
    return CENTRES[min(max(32000 - token_id - 1, 0), len(CENTRES) - 1)]


def test_encode_on_edges_and_their_neighbours_in_both_precisions():
    float32 = EDGES.astype(np.float32)
    one, minus = np.float32(np.inf), np.float32(-np.inf)
    single = np.concatenate([float32, np.nextafter(float32, one), np.nextafter(float32, minus)])
    double = np.concatenate([EDGES, np.nextafter(EDGES, np.inf), np.nextafter(EDGES, -np.inf)])
    for actions in (single, double):
        expected = [published_encode(a) for a in actions]
        ids = ActionTokenizer().encode(torch.from_numpy(actions))
        assert ids.dtype == torch.int64
        assert ids.tolist() == expected
        assert ids.tolist() == (32000 - np.digitize(np.clip(actions, -1.0, 1.0), EDGES)).tolist()
    # float32 edges do fall on both sides of their bins, so that a comparison in float32 would be seen
    assert (float32.astype(np.float64) < EDGES).any() and (float32.astype(np.float64) > EDGES).any()


def test_encode_random_half_precision_and_out_of_range():
    tokenizer = ActionTokenizer()
    actions = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = actions.to(dtype)
        assert tokenizer.encode(cast).tolist() == [published_encode(a) for a in cast.tolist()]
    ends = torch.tensor([-1.0, 1.0, -7.0, 7.0])
    assert tokenizer.encode(ends).tolist() == [31999, 31744, 31999, 31744]


def test_decode_all_ids_and_the_clipped_ones():
    ids = torch.arange(31744, 32000)
    actions = ActionTokenizer().decode(ids)
    assert actions.dtype == torch.float32
    assert actions.tolist() == [float(np.float32(published_decode(i))) for i in ids.tolist()]
    assert actions[0] == actions[1] and len(set(actions.tolist())) == 255  # 31744 and 31745 decode alike
    outside = ActionTokenizer().decode(torch.tensor([0, 31743, 32000, 32063]))
    assert torch.equal(outside, actions[[0, 0, -1, -1]])


def test_roundtrip_returns_the_id_except_the_published_quirk():
    tokenizer = ActionTokenizer()
    ids = torch.arange(31744, 32000)
    again = tokenizer.encode(tokenizer.decode(ids))
    assert again.tolist() == [31745, *range(31745, 32000)]


def test_bins_are_the_slice_of_logits_and_shapes_are_kept():
    tokenizer = ActionTokenizer()
    actions = torch.linspace(-1, 1, 2 * 3 * 7).reshape(2, 3, 7)
    ids, bins = tokenizer.encode(actions), tokenizer.encode_bins(actions)
    assert ids.shape == bins.shape == actions.shape
    assert torch.equal(tokenizer.to_bin(ids), bins) and torch.equal(tokenizer.to_id(bins), ids)
    assert torch.equal(tokenizer.decode_bins(bins), tokenizer.decode(ids))
    assert bins.flatten()[0] == 255 and bins.flatten()[-1] == 0
    assert tokenizer.encode(actions.mT).tolist() == ids.mT.tolist()  # not contiguous
    vocabulary = torch.randn(32064, generator=torch.Generator().manual_seed(0))
    best = vocabulary[-320:-64].argmax()  # SimpleVLA-RL's slice
    assert (
        tokenizer.to_id(best) == 31744 + best
        and vocabulary[tokenizer.to_id(best)] == vocabulary[-320:-64].max()
    )


def test_unnormalize_and_normalize_with_mask():
    q01, q99, mask = [-0.5, 0.0, 0.2], [0.7, 2.0, 0.9], [True, True, False]
    actions = torch.tensor([[-1.0, 0.0, 0.4], [1.0, 0.5, 1.0]])
    units = unnormalize(actions, q01, q99, mask)
    expected = [[-0.5, 1.0, 0.4], [0.7, 1.5, 1.0]]
    torch.testing.assert_close(units, torch.tensor(expected))
    torch.testing.assert_close(normalize(units, q01, q99, mask), actions, atol=1e-6, rtol=0)
    wide = unnormalize(actions, q01, q99, mask, eps=1.0)
    torch.testing.assert_close(wide[0], torch.tensor([-0.5, 1.5, 0.4]))
    beyond = torch.tensor([2.0, -1.0, 3.0])
    assert normalize(beyond, q01, q99, mask).tolist() == [1.0, -1.0, 3.0]
    assert normalize(beyond, q01, q99, mask, clip=False)[0] > 1.5
    constant = normalize(torch.tensor([0.3]), [0.3], [0.3], [True])
    assert constant.item() == -1.0  # q99 = q01 is divided by eps, not by zero


@pytest.mark.parametrize("function", [unnormalize, normalize])
@pytest.mark.parametrize("shapes", [(6, 7, 7), (7, 6, 7), (7, 7, 1)])
def test_statistics_of_another_width_are_refused(function, shapes):
    statistics = [torch.ones(n) for n in shapes]
    with pytest.raises(ValueError, match="must be of shape"):
        function(torch.zeros(4, 7), *statistics)

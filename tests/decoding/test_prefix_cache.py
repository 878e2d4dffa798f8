"""Replies that share their prompts' keys and values, against rows that have them of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arc.decoding.prefix_cache import PrefixCache

HEADS, SHARED, SIZE = 8, 2, 64
CONFIG = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=SHARED)
LAYER = SimpleNamespace(layer_idx=0)
PROMPTS, OWNERS = (70, 0, 1, 300), np.array([0, 0, 0, 1, 1, 3, 3, 3, 3, 3])  # nobody has the third


def filled_cache(device, dtype, tokens=5):
    """A cache with prompts and some tokens of each reply; and the keys and values of each reply's row as a whole."""
    generator = torch.Generator().manual_seed(0)

    def numbers(rows, count):
        return torch.randn(2, rows, SHARED, count, SIZE, generator=generator).to(dtype).to(device)

    cache = PrefixCache(CONFIG, prompts=6, rows=12, width=300, length=20, device=torch.device(device))
    cache.begin(PROMPTS, OWNERS)
    prompts = []
    for at, length in enumerate(PROMPTS):
        prompts.append(numbers(1, max(1, length)))
        cache.begin_prompts(at, max(1, length))
        cache.update(*prompts[-1], 0)
    own = numbers(len(OWNERS), tokens)
    for at in range(tokens):
        cache.begin_step(len(OWNERS), torch.tensor([at], device=device))
        cache.update(*own[..., at : at + 1, :], 0)
    rows = [torch.cat([prompts[at][:, 0, :, : PROMPTS[at]], own[:, row]], dim=2) for row, at in enumerate(OWNERS)]
    return cache, rows


def attend_alone(query, rows):
    """Attention of each row's query (rows, heads, 1, size) to its own keys and values (2, heads, seen, size)."""
    found = [
        torch.nn.functional.scaled_dot_product_attention(query[at], *row, enable_gqa=True)
        for at, row in enumerate(rows)
    ]
    return torch.stack(found).transpose(1, 2)


def make_queries(count, dtype=torch.float32):
    return torch.randn(count, HEADS, 1, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_rows_see_their_prompt_and_their_own_tokens():
    cache, rows = filled_cache("cpu", torch.float32)
    query = make_queries(len(rows))
    found, _ = cache.attend(LAYER, query, None, None, None)
    assert found.shape == (len(rows), 1, HEADS, SIZE)
    assert torch.allclose(found, attend_alone(query, rows), atol=1e-5)
    masked = cache._attend_with_mask(query, cache.layers[0], None)  # as on GPUs without the kernel
    assert torch.allclose(masked, found, atol=1e-5)


def test_rows_that_go_on():
    cache, rows = filled_cache("cpu", torch.float32)
    keep = np.array([2, 4, 5, 9])
    cache.move(keep, 5)
    rows = [rows[at] for at in keep]
    new = torch.randn(2, len(keep), SHARED, 1, SIZE)
    cache.begin_step(len(keep), torch.tensor([5]))
    cache.update(*new, 0)
    rows = [torch.cat([row, new[:, at]], dim=2) for at, row in enumerate(rows)]
    query = make_queries(len(keep))
    assert torch.allclose(cache.attend(LAYER, query, None, None, None)[0], attend_alone(query, rows), atol=1e-5)


def test_memory_is_that_of_the_prompts_and_replies():
    cache, _ = filled_cache("cpu", torch.float32)
    assert (cache.width, cache.length) == (512, 32)
    assert cache.bytes == 2 * 4 * SHARED * SIZE * (6 * 512 + 12 * 32)
    assert cache.most == 8


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [None, [0, 3, 4, 6]])
def test_the_kernel_gives_what_the_mask_gives(keep):
    exact, rows = filled_cache("cuda", torch.float64)
    cache, _ = filled_cache("cuda", torch.bfloat16)
    if keep is not None:
        rows = [rows[at] for at in keep]
        for each in (exact, cache):
            each.move(np.array(keep), 5)
            each.begin_step(len(keep), torch.tensor([4], device="cuda"))
    query = make_queries(len(rows), torch.bfloat16).cuda()
    expected = exact.attend(LAYER, query.double(), None, None, None)[0]
    assert torch.allclose(expected, attend_alone(query.double(), rows), atol=1e-9)
    found = cache.attend(LAYER, query, None, None, None)[0]
    masked = cache._attend_with_mask(query, cache.layers[0], None)
    errors = [((part.double() - expected).norm() / expected.norm()).item() for part in (found, masked)]
    assert errors[0] < 0.01 and errors[0] < 2 * errors[1] + 1e-3, errors

import functools

import torch
import torch.nn.functional as functional

from heterostep.precision import name_of, use_tf32


def test_tf32_halves_attention_on_a_gpu_alone(monkeypatch):
    seen = []

    def attend(query, key, value, attn_mask=None, **options):
        seen.append((query.dtype, None if attn_mask is None else attn_mask.dtype))
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32()
        wrapped = functional.scaled_dot_product_attention
        use_tf32()
        assert functional.scaled_dot_product_attention is wrapped
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    x, mask = torch.randn(1, 2, 3, 4), torch.zeros(3, 3)
    assert wrapped(x, key=x, value=x, attn_mask=mask) is x

    class OnGPU(torch.Tensor):
        is_cuda = True

    y = x.as_subclass(OnGPU)
    assert wrapped(query=y, key=y, value=y, attn_mask=mask).dtype == torch.float32
    assert wrapped(y.half(), y.half(), y.half(), torch.ones(3, 3, dtype=torch.bool)).dtype == torch.float16
    half, whole = torch.float16, torch.float32
    assert seen == [(whole, whole), (half, half), (half, torch.bool)]


def test_a_function_that_others_put_around_attention_is_not_taken_for_ours(monkeypatch):
    attend = functional.scaled_dot_product_attention
    theirs = functools.wraps(attend)(lambda *args, **kwargs: attend(*args, **kwargs))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", theirs)
    assert name_of(torch.float32) == "float32"
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32()
    finally:
        torch.set_float32_matmul_precision(before)
    ours = functional.scaled_dot_product_attention
    assert ours is not theirs and name_of(torch.float32) == "tf32" and name_of(torch.bfloat16) == "bfloat16"
    monkeypatch.setattr(functional, "scaled_dot_product_attention", functools.wraps(ours)(lambda: None))
    assert name_of(torch.float32) == "tf32"

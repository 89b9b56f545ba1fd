"""LTX-Video alone: what the tests of all families do not ask."""

import torch

import heterostep
from small_ltx import run_ltx, small_ltx
from small_wan import moving_square


def test_a_given_frame_runs_at_dense_steps_alone():
    pipe = small_ltx("image")
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    run_ltx(pipe, steps=12, image=moving_square()[0])
    report = heterostep.report(pipe)
    assert (report.steps_map[0] == sum(share == 1 for share in report.active_share)).all()


def test_a_prompt_may_change_at_a_sparse_step():
    pipe, seen = small_ltx(), []

    def change(pipe, step, time, tensors):
        seen.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"].roll(1, 1)} if step == 5 else {}

    with heterostep.enabled(pipe, share=0.5, sparse_share=0.3):
        kept = run_ltx(pipe, steps=12)
        assert heterostep.report(pipe).active_share[6] < 1
        changed = run_ltx(
            pipe,
            steps=12,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert len(seen) == 12 and changed.isfinite().all() and not torch.equal(changed, kept)

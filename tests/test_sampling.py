"""The method as one function does what `heterostep.enable` does, and wants no pipeline."""

import math

import pytest
import torch

import heterostep
from heterostep.compare.regimes import in_regime, named
from heterostep.errors import HeterostepError
from heterostep.sampling import sample
from heterostep.sigmas import nominal_sigmas
from small import run, small_pipeline

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline(expand_timesteps=False)


def guided_velocity(pipe, guidance):
    """The transformer's velocity as the pipeline makes it of its predictions with and without the prompt."""
    # To 512 tokens, as the call does: the model attends to those of the padding too.
    prompt, negative = pipe.encode_prompt(PROMPT, None, guidance > 1, device="cpu", max_sequence_length=512)

    @torch.no_grad()
    def velocity(x, sigma):
        def predicted(text):
            timestep = torch.tensor([1000 * sigma] * len(x))
            return pipe.transformer(hidden_states=x, timestep=timestep, encoder_hidden_states=text)[0]

        v = predicted(prompt)
        if guidance > 1:
            without = predicted(negative)
            v = without + guidance * (v - without)
        return v

    return velocity


@pytest.mark.parametrize(
    ("steps", "share", "shift", "guidance"),
    [(20, 0.5, 5, 3), (40, 0.25, 8, 3), (12, 0.75, 3, 3), (20, 0.5, 5, 1), (12, 1.0, 5, 3)],
)
def test_it_is_what_enable_does_with_euler(pipe, steps, share, shift, guidance):
    with in_regime(pipe, named(f"euler-{steps}-shift-{shift}-guidance-{guidance}")) as options:
        pipe.scheduler.set_timesteps(steps)
        sigmas = pipe.scheduler.sigmas.tolist()
        with heterostep.enabled(pipe, share=share):
            expected = run(pipe, steps, guidance_scale=options["guidance_scale"])
        evaluated = [step for step, part in enumerate(heterostep.report(pipe).active_share) if part]
    noise = pipe.prepare_latents(1, 16, 64, 64, 9, torch.float32, "cpu", torch.Generator().manual_seed(0))
    velocity, called = guided_velocity(pipe, guidance), []

    def watched(x, sigma):
        called.append(sigmas.index(sigma))
        return velocity(x, sigma)

    latents = sample(watched, noise, sigmas, share, guided=guidance > 1)
    assert called == evaluated and len(called) == int(share * steps)
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()


def test_each_sample_has_its_own_weight_and_correction():
    """One that is in a batch of like ones ends where it does alone."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x, sigma):
        return x.sign() * math.sin(2 * sigma) + x / 2

    both, alone = (sample(velocity, each, nominal_sigmas(20), 0.4) for each in (x[:1].repeat(2, 1, 1), x[:1]))
    torch.testing.assert_close(both[:1], alone)
    # One evaluation is one step of Euler over all.
    torch.testing.assert_close(sample(velocity, x, (1.0, 0.5, 0.0), 0.5), x - velocity(x, 1.0))


@pytest.mark.parametrize(
    ("sigmas", "share", "message"),
    [
        (nominal_sigmas(10), 0.05, "less than one"),
        (nominal_sigmas(10), 1.5, "share"),
        ((0.0, 1.0), 1.0, "fall"),
        ((1.0,), 1.0, "fall"),
    ],
)
def test_what_is_not_possible_is_refused(sigmas, share, message):
    with pytest.raises(HeterostepError, match=message):
        sample(lambda x, sigma: x, torch.ones(1, 2), sigmas, share)


def test_a_velocity_of_zero_and_sigmas_that_are_no_numbers():
    x, only_first = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0], [0.0]])
    sigmas = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    made = sample(lambda x, sigma: (x * 0.1 + sigma) * only_first, x, sigmas, 0.5)
    assert made.isfinite().all() and torch.equal(made[1], x[1])
    with pytest.raises(HeterostepError, match="^sigmas must begin at 1 or below, not at 1.5$"):
        sample(lambda x, sigma: x, torch.zeros(1, 4), [1.5, 1.0, 0.5, 0.0], 0.5)
    with pytest.raises(HeterostepError, match="^share must be one number here"):
        sample(lambda x, sigma: x, torch.zeros(1, 4), [1.0, 0.5, 0.0], [1, 0])
    with pytest.raises(HeterostepError, match="must fall"):
        sample(lambda x, sigma: x, x, [1.0, math.nan, 0.5, 0.0], 0.7)

"""Verdict of the page: one sentence on whether the run works, and the few numbers behind it.

A run with a reference (a teacher) is judged by the distance of its samples from the reference's, now against before
training. Distances are not exact: the thresholds are wide, so that chance does not decide. A run without one is judged
by its held-out loss. Scores are shown beside both, but do not decide, because a user's scorer does not say whether
more is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_distill.diffusion.requests import SampleRequest
from titan_distill.validation.report.run_files import SAMPLES, RunFiles

GOOD, BETTER, SAME = 0.5, 0.85, 1.1
"""Largest distance, as a share of the one before training, that counts as a success, as progress, and as no change."""
DISTANCES = ("sliced_wasserstein_excess", "sliced_wasserstein")
FEW_PROMPTS = 24
"""Number of prompts below which a distance is called rough: its floor is 1.9 / √N standard deviations."""


@dataclass(frozen=True)
class Fact:
    """One number of the verdict."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run."""

    tone: str
    """`good`, `fair`, `open` or `bad`; colours the sentence."""
    sentence: str
    facts: list[Fact]


def judge(run: RunFiles) -> Verdict:
    """Returns the verdict on a run as far as it has come."""
    facts = [fact for fact in (_distance_fact(run), *_score_facts(run), _work_fact(run), _step_fact(run)) if fact]
    tone, sentence = _distance_sentence(run) or _loss_sentence(run) or ("open", _no_sentence(run))
    return Verdict(tone, sentence, facts)


def compare(runs: Sequence[RunFiles]) -> str:
    """Returns one sentence on which run is closest to its reference; empty if one of them has no distance."""
    if len({run.config.get("validation", {}).get("num_prompts") for run in runs}) > 1:
        return "Validated on different numbers of prompts: the distances of these runs can't be compared."
    references = [_reference(run) for run in runs]
    if any(reference != references[0] for reference in references):
        return "Their references are not sampled in the same way: the distances of these runs can't be compared."
    for name in DISTANCES:
        found = []
        for run in runs:
            sampled = run.latest
            if sampled and sampled.now and sampled.reference:
                value = _newest(run, sampled.now, name)
                found += [] if value is None else [(value, run.name, sampled.reference.role)]
        if len(found) == len(runs) > 1:
            (value, best, reference), *others = sorted(found)
            against = ", ".join(f"{other:.2f} ({own})" for other, own, _ in others)
            return f"{best} is closest to the {reference}: distance {value:.2f}, against {against}."
    return ""


def _reference(run: RunFiles) -> tuple[SampleRequest, Any, Any] | None:
    """Returns how the run's reference is sampled, and where its weights are from."""
    if run.latest is None or (reference := run.latest.reference) is None:
        return None
    role = run.config.get("roles", {}).get(reference.role, {})
    return reference, role.get("path"), role.get("init_from")


def _distances(run: RunFiles) -> tuple[str, float, float] | None:
    """Returns the name of a distance from the reference, and its values before training and now: of the excess, unless
    it was cut at 0 before training, of which nothing is a multiple. None if none is known."""
    request, found = run.latest, None
    if request is None or request.before is None or request.now is None:
        return None
    for name in DISTANCES:
        before = _newest(run, request.before, name)
        now = _newest(run, request.now, name)
        if before is not None and now is not None:
            found = name, before, now
            if before > 0:
                break
    return found


def _distance_sentence(run: RunFiles) -> tuple[str, str] | None:
    found, request = _distances(run), run.latest
    if found is None or request is None or request.now is None or request.reference is None:
        return None
    before, now = (max(value, 0.0) for value in found[1:])
    role, reference, when = request.now.role, request.reference.role, f"after {_steps(request.step)}"
    goes_on = run.is_running
    if before == 0:
        return "open", f"Before training the {role}'s videos were already as close as the {reference}'s own."
    ratio = now / before
    if ratio <= GOOD:
        start = "It is working" if goes_on else "It worked"
        closer = f"{1 / ratio:.1f}× closer to" if ratio > 0.05 else "by this measure the same as"
        return "good", f"{start}: {when} the {role}'s videos are {closer} the {reference}'s than before training."
    if ratio <= BETTER:
        start = "It helps so far" if goes_on else "It helped"
        closer = f"{100 * (1 - ratio):.0f} % closer to"
        return "fair", f"{start}: {when} the {role}'s videos are {closer} the {reference}'s than before training."
    if ratio <= SAME:
        start = "No effect yet" if goes_on else "No effect"
        return "open", f"{start}: {when} the {role}'s videos are as far from the {reference}'s as before training."
    start = "It is getting worse" if goes_on else "It failed"
    far = f"{ratio:.1f}× as far from the {reference}'s as before training"
    return "bad", f"{start}: {when} the {role}'s videos are {far}."


def _loss_sentence(run: RunFiles) -> tuple[str, str] | None:
    prefix = f"{SAMPLES}loss/"
    roles = sorted({key.removeprefix(prefix) for line in run.metrics for key in line if key.startswith(prefix)})
    for role in roles:
        before, now = run.oldest(f"{prefix}{role}"), run.newest(f"{prefix}{role}")
        if before and now is not None and run.step > 0:
            change = f"{before:.3g} → {now:.3g}"
            when = f"after {_steps(run.step)}"
            if now < 0.98 * before:
                return "good", f"It learns: {when} the {role}'s held-out loss has fallen, {change}."
            if now > 1.02 * before:
                return "bad", f"It does not generalise: {when} the {role}'s held-out loss has risen, {change}."
            start = "No effect yet" if run.is_running else "No effect"
            return "open", f"{start}: {when} the {role}'s held-out loss is {now:.3g}, as before."
    return None


def _no_sentence(run: RunFiles) -> str:
    when = f"after {_steps(run.step)}" if run.step else "before the first step"
    if run.latest is None:
        return f"No validation yet, {when}: nothing tells whether it works."
    if run.latest.reference is not None:
        return f"The run stands {when}: the next validation tells whether it works."
    return f"The run stands {when}: compare the videos before and now; it has no reference to measure against."


def _steps(step: int) -> str:
    return f"{step:,} step{'' if step == 1 else 's'}"


def _distance_fact(run: RunFiles) -> Fact | None:
    found, request = _distances(run), run.latest
    if found is None or request is None or request.reference is None:
        return None
    name, before, now = found
    notes = []
    if request.rival and (own := _newest(run, request.rival, name)) is not None:
        notes.append(f"{request.rival.role} itself in {_num_steps(request.rival)} steps: {own:.2f}")
    num_prompts = run.config.get("validation", {}).get("num_prompts")
    if num_prompts and num_prompts < FEW_PROMPTS:
        notes.append(f"rough: {num_prompts} prompts")
    return Fact(f"Distance to the {request.reference.role} (0: alike)", f"{before:.2f} → {now:.2f}", "; ".join(notes))


def _score_facts(run: RunFiles) -> list[Fact]:
    """Returns the first score of the role in training, before and now, with the reference's beside it."""
    request = run.latest
    if request is None or request.now is None:
        return []
    prefix = f"{SAMPLES}{request.now.label}/"
    names = dict.fromkeys(key.removeprefix(prefix) for line in run.metrics for key in line if key.startswith(prefix))
    for name in names:
        if name in DISTANCES or (now := _newest(run, request.now, name)) is None:
            continue
        before = _newest(run, request.before, name)
        notes = []
        if request.reference and (reference := _newest(run, request.reference, name)) is not None:
            notes.append(f"{request.reference.role}: {reference:.2f}")
        if request.rival and (rival := _newest(run, request.rival, name)) is not None:
            notes.append(f"in {_num_steps(request.rival)} steps: {rival:.2f}")
        if before is None and not notes and (first := run.oldest(prefix + name)) is not None:
            notes.append(f"first validation: {first:.2f}")
        value = f"{now:.2f}" if before is None else f"{before:.2f} → {now:.2f}"
        return [Fact(name.replace("_", " ").capitalize(), value, "; ".join(notes))]
    return []


def _newest(run: RunFiles, sample: SampleRequest | None, name: str) -> float | None:
    """Returns the last score or distance of a sample set; None for one that is not there or was not measured."""
    return None if sample is None else run.newest(f"{SAMPLES}{sample.label}/{name}")


def _work_fact(run: RunFiles) -> Fact | None:
    request = run.latest
    if request is None or request.now is None or request.reference is None:
        return None
    now, reference = _num_passes(request.now), _num_passes(request.reference)
    return Fact("Network passes per video", f"{reference} → {now}", f"{reference / now:.0f}× fewer")


def _num_steps(sample: SampleRequest) -> int:
    return len(sample.sigmas) if sample.sigmas else sample.num_steps


def _num_passes(sample: SampleRequest) -> int:
    return _num_steps(sample) * (1 if sample.guidance_scale == 1 else 2)


def _step_fact(run: RunFiles) -> Fact:
    total = run.num_steps
    state = "running" if run.is_running else "finished" if total and run.step >= total else "not running"
    return Fact("Steps", f"{run.step:,} of {total:,}" if total else f"{run.step:,}", state)

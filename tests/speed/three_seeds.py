"What SFT and RL on images add to the embedded model, over three seeds."
import os
import subprocess
import sys
import tempfile

import numpy as np
from measuring import ROOT, Bound, quiet
from medvlthinker.app.profile import Workspace, load_profile, overrides
from medvlthinker.app.runs import rollouts
from medvlthinker.difficulty.pass_counts import curate, keep_band, pass_counts
from medvlthinker.evaluation.evaluate import grade_rollout
from medvlthinker.generation.request import Sampling
from medvlthinker.generation.tiny_model import make_tiny_model

RECIPES = ("tiny-SFT_PMC", "tiny-RL_PMC")
BOUNDS = tuple(Bound(f"{name} above its base, over three seeds", "standard errors", 3, "at least")
               for name in RECIPES)


def verdicts(profile, model: str) -> list[np.ndarray]:
    "Right or wrong for each question, a test set at a time."
    sets = rollouts(profile, model, Sampling(max_tokens=profile.max_tokens), show=quiet)
    return [grade_rollout(*pair, ("regrade",)).regrade_correct.to_numpy(float)
            for pair in sets.values()]


def gains(seed: int) -> dict[str, tuple[float, float]]:
    "Of each recipe the gain of its macro average with its standard error, one seed of everything."
    workspace = Workspace("smoke")
    base = str(make_tiny_model(workspace.home / "base", seed=seed, show=quiet))
    profile = load_profile("smoke", seed=seed, limit=200, models=base, corpus="pmc_vqa")
    sampling = Sampling(n=8, temperature=1.0, max_tokens=profile.max_tokens)
    samples, rows = rollouts(profile, base, sampling, kind="corpus", show=quiet)["pmc_vqa"]
    counts = keep_band(pass_counts(grade_rollout(samples, rows, ("strict",))))
    curate(samples.path, counts, workspace.curated / "synthetic", by=base)
    before, found = verdicts(profile, base), {}
    for name in RECIPES:
        words = [f"{key}={value}" for key, value in overrides(profile).items()]
        subprocess.run([sys.executable, "-m", "medvlthinker.app.cli", "train", "smoke",
                        f"recipe={name}", f"init={base}", *words], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL)
        changes = [new - old for new, old in zip(verdicts(profile, name), before)]
        error = sum(each.var(ddof=1) / len(each) for each in changes) ** 0.5 / len(changes)
        found[name] = float(np.mean([each.mean() for each in changes])), error
        print(f"    seed {seed}, {name}: {100 * found[name][0]:+.1f} points, standard error "
              f"{100 * error:.1f}, n={sum(map(len, changes))}", flush=True)
    return found


def three_seeds():
    "Other weights, examples, samples and order each time; 200 questions a set, for nothing else."
    seeds = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as home:
            os.environ["MEDVLTHINKER_HOME"] = home
            seeds.append(gains(seed))
    for name in RECIPES:
        changes, errors = zip(*(each[name] for each in seeds))
        yield np.mean(changes) / (sum(error**2 for error in errors) ** 0.5 / len(errors))

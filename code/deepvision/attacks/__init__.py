"""Adversarial attacks on any callable `model(x) -> logits`. Needs torch only.

    from deepvision.attacks import APGD, InputScale, accuracy_under_attack

    attack = APGD(norm="linf", epsilon=8, steps=100, pixels=InputScale("255", mean, std))
    x_adv = attack.perturb(model, x, y)
    print(accuracy_under_attack(model, attack, x, y))

Attacks     PGD, FGSM, APGD, FAB, Square; Attack is their base class
Suite       AutoAttack, the standard set, and its Progress
Units       InputScale: the unit of epsilon, mean and std of the input
Losses      LOSSES: "ce", "margin", "dlr"; attack_succeeded
Norms       lp_norm, project, random_start, steepest_step; EPSILONS, the default budgets
Evaluation  accuracy_under_attack, correct_under_attack; run_diagnostics, Diagnostic
Helpers     frozen_eval_mode, is_randomised, add_random_noise, zero_gradient_mask
"""

from deepvision.attacks.accuracy import accuracy_under_attack, correct_under_attack
from deepvision.attacks.apgd import APGD
from deepvision.attacks.autoattack import AutoAttack, Progress
from deepvision.attacks.diagnostics import (
    Diagnostic,
    add_random_noise,
    run_diagnostics,
    zero_gradient_mask,
)
from deepvision.attacks.fab import FAB
from deepvision.attacks.losses import LOSSES, attack_succeeded
from deepvision.attacks.norms import (
    EPSILONS,
    InputScale,
    lp_norm,
    project,
    random_start,
    steepest_step,
)
from deepvision.attacks.pgd import FGSM, PGD, Attack, frozen_eval_mode, is_randomised
from deepvision.attacks.square import Square

__all__ = [
    "APGD",
    "Attack",
    "AutoAttack",
    "Diagnostic",
    "EPSILONS",
    "FAB",
    "FGSM",
    "InputScale",
    "LOSSES",
    "PGD",
    "Progress",
    "Square",
    "accuracy_under_attack",
    "add_random_noise",
    "attack_succeeded",
    "correct_under_attack",
    "frozen_eval_mode",
    "is_randomised",
    "lp_norm",
    "project",
    "random_start",
    "run_diagnostics",
    "steepest_step",
    "zero_gradient_mask",
]

"""Takes DP-SGD steps by hand: calibrated noise, Poisson-sampled batches, clipped gradients, and their epsilon."""

import torch

from trilemma.data.roots import default_roots
from trilemma.data.specs import Phantom
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_params, set_params
from trilemma.privacy.accounting import epsilon
from trilemma.privacy.specs import DpSgd
from trilemma.randomness import generator, numpy_generator
from trilemma.robustness.objectives import standard

STEPS, DELTA = 5, 1e-3
train = Phantom(size=16, train=200, val=10, test=10, classes=2).load(default_roots()).train
classifier = Resnet9(width=4).make(channels=1, image_size=16, num_classes=2, seed=0)
objective = standard()
plan = DpSgd(epsilon=3.0, delta=DELTA, clip=1.0).make(num_units=len(train), batch_size=40, steps=STEPS)
print(f"noise multiplier {plan.noise_multiplier:.2f} at sampling rate {plan.sampling_rate}")

params_P = get_params(classifier)
for step in range(STEPS):
    index = plan.sample(numpy_generator(0, "batches", step)).numpy()
    x_BCHW, y_B = train.x(index), train.y(index)
    views_BVCHW = objective.views(classifier, x_BCHW, y_B, generator(0, "defence", step))
    clipped = plan.gradient_sum(classifier, objective.loss, views_BVCHW, y_B)
    params_P = params_P - 0.1 * plan.noised_mean(clipped.sum_P, plan.noise_source(numpy_generator(0, "noise", step)))
    set_params(classifier, params_P)
    share = (clipped.norms_B > plan.clipper.clip).float().mean() if len(index) else torch.tensor(0.0)
    print(f"step {step}: {len(index)} records, {share:.0%} of them clipped")
print(f"epsilon {epsilon([plan.event(STEPS)], DELTA):.2f} at delta {DELTA} for {STEPS} steps")

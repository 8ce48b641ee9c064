"""Attacks a classifier with PGD directly; any network goes into a Classifier, which normalises inside."""

import torch
from torch import nn

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.pgd import pgd
from trilemma.data.roots import default_roots
from trilemma.data.specs import Phantom
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator, global_seed

dataset = Phantom(size=32, train=300, val=10, test=60, classes=2, shift=0.0).load(default_roots())
with global_seed(0, "initialisation"):
    layers = nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)
    classifier = Classifier(nn.Sequential(*layers), num_classes=2)

optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
for epoch in range(30):
    for index in torch.randperm(300, generator=generator(0, "batches", epoch)).view(-1, 30).numpy():
        loss = nn.functional.cross_entropy(classifier(dataset.train.x(index)), dataset.train.y(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

classifier.eval()
x_BCHW, y_B = dataset.test.x(), dataset.test.y()
correct_B = classifier(x_BCHW).argmax(1) == y_B
print(f"clean: {correct_B.float().mean():.2f}")
for levels in (1, 4, 16):
    budget = Budget("linf", levels / 255)
    x_adv_BCHW = pgd(classifier, x_BCHW, y_B, budget, generator(0, "attack"), steps=10)
    robust_B = correct_B & (classifier(x_adv_BCHW).argmax(1) == y_B)
    print(f"PGD-10 {budget.label}: robust {robust_B.float().mean():.2f}")

"""Knowledge distillation (Hinton, Vinyals and Dean 2015): a small network learns to answer as a large one does.

On images that anybody may see it reads no private record: the teacher's answers are post-processing of a released
model, and so is the student.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trilemma.models.classifier import Classifier
from trilemma.randomness import generator, global_seed


def distil(
    student: Classifier,
    teacher: Classifier,
    x_NCHW: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    temperature: float,
    seed: int,
) -> Classifier:
    """Returns the student after training on the teacher's answers, in evaluation mode; a copy is not made.

    Each step looks at mixtures of two images, flipped or not: of few images that makes many, and the teacher says of
    each what it is. Weights that are exactly zero stay zero, so that a pruned network stays pruned. Adam (Kingma and Ba
    2015) with a learning rate that falls to zero by a cosine; the loss is the Kullback-Leibler divergence at a
    temperature, times its square.

    Args:
        student: On the teacher's device.
        teacher: In evaluation mode; unchanged.
        x_NCHW: Images in [0, 1].
        epochs: Passes over them.
        learning_rate: At the start.
        batch_size: Images in a step.
        temperature: Above 1 the answers that are nearly zero count more.
        seed: Of order, mixtures and dropout.

    Raises:
        ValueError: Where the student's weights become infinite, or there are too few images.
    """
    if len(x_NCHW) < 2:
        raise ValueError(f"Distillation needs at least two images, and there are {len(x_NCHW)}.")
    draws, device = generator(seed, "distillation"), teacher.device
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    kept = [parameter.detach() != 0 if parameter.ndim > 1 else None for parameter in trained]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    num_steps = epochs * math.ceil(len(x_NCHW) / batch_size)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    student.train()
    with global_seed(seed, "distillation", "dropout"):
        for _ in range(epochs):
            for index in torch.randperm(len(x_NCHW), generator=draws).split(batch_size):
                if len(index) == 1:
                    continue  # batch norm has no variance of a single image
                x_BCHW = _mixed(x_NCHW[index], draws).to(device)
                with torch.no_grad():
                    answer_BK = teacher(x_BCHW)
                optimizer.zero_grad()
                _divergence(student(x_BCHW), answer_BK, temperature).backward()
                optimizer.step()
                with torch.no_grad():
                    for parameter, keep in zip(trained, kept, strict=True):
                        if keep is not None:
                            parameter.mul_(keep)
                rates.step()
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise ValueError(f"learning_rate {learning_rate:g} is too large: the student's weights became infinite.")
    return student.eval()


def _divergence(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    target_BK = F.log_softmax(teacher_BK / temperature, 1)
    found_BK = F.log_softmax(student_BK / temperature, 1)
    return F.kl_div(found_BK, target_BK, reduction="batchmean", log_target=True) * temperature**2


def _mixed(x_BCHW: Tensor, draws: torch.Generator) -> Tensor:
    """Returns mixtures of each image with another one, some of them flipped left to right."""
    share_B = torch.rand(len(x_BCHW), generator=draws)[:, None, None, None]
    flip_B = (torch.rand(len(x_BCHW), generator=draws) < 0.5)[:, None, None, None]
    other = x_BCHW[torch.randperm(len(x_BCHW), generator=draws)]
    mixed = share_B * x_BCHW + (1 - share_B) * other
    return torch.where(flip_B, mixed.flip(-1), mixed)

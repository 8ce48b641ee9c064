"""Random changes of training images, each record's from its own draws."""

import torch
from torch import Tensor
from torch.nn import functional


def augment(x_BCHW: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Returns shifted and mirrored images.

    Args:
        x_BCHW: Images.
        shift: Each image moves by up to so many pixels in both directions; its border is repeated.
        flip: Mirror each image left and right with probability one half.
        generator: On the CPU.
    """
    batch, _, height, width = x_BCHW.shape
    if shift:
        padded = functional.pad(x_BCHW, (shift,) * 4, mode="replicate")
        offset_2B = torch.randint(0, 2 * shift + 1, (2, batch), generator=generator).to(x_BCHW.device)
        rows_BH1 = (offset_2B[0, :, None] + torch.arange(height, device=x_BCHW.device))[:, :, None]
        columns_B1W = (offset_2B[1, :, None] + torch.arange(width, device=x_BCHW.device))[:, None, :]
        record_B11 = torch.arange(batch, device=x_BCHW.device)[:, None, None]
        x_BCHW = padded.permute(0, 2, 3, 1)[record_B11, rows_BH1, columns_B1W].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored_B = (torch.rand(batch, generator=generator) < 0.5).to(x_BCHW.device)
        x_BCHW = torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    return x_BCHW

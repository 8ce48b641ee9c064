"""What a ward's computer runs: a folder of `trilemma export-model`, with ONNX Runtime, NumPy and Pillow alone.

python examples/predict_without_torch.py FOLDER IMAGE...
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit("usage: predict_without_torch.py FOLDER IMAGE...")
folder = Path(sys.argv[1])
names = ("MODEL_CARD.md", "model.onnx", "model_card.json")
missing = [name for name in ("SHA256SUMS", *names) if not (folder / name).is_file()]
if missing:
    sys.exit(f"{folder} is no folder of `trilemma export-model`: {missing[0]} is missing")
sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text("utf-8").splitlines())
for name in names:
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums.get(name):
        sys.exit(f"{folder / name} is not the file that was exported: get the folder again")

card = json.loads((folder / "model_card.json").read_text("utf-8"))
mode, size = "L" if card["input"]["channels"] == 1 else "RGB", card["input"]["resized_to"]
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
for path in sys.argv[2:]:
    with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        deep = any(";16" in str(tile[3]) for tile in image.tile)  # told before Pillow makes 8 bits of several channels
        if image.format == "JPEG":
            image.draft(mode, (2 * size, 2 * size))  # large files are decoded smaller, as they were for the training
        upright = ImageOps.exif_transpose(image)
    if deep or upright.mode.startswith(("I", "F")):
        sys.exit(f"{path} has more than 8 bits per channel: save it with 8 bits")
    if upright.has_transparency_data:
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, upright.convert("RGBA"))
    pixels = np.asarray((upright.convert("RGB") if upright.mode in ("P", "RGBA") else upright).convert(mode))
    (answer,) = session.run(["probabilities"], {"image": pixels[None]})[0]
    print(path, *(f"{name} {share:.6f}" for name, share in zip(card["classes"], answer, strict=True)), sep="\t")

"""DWPose (arXiv 2307.15880) from its two ONNX files: a YOLOX person box, then 133 joints read off two 1-D heat maps."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import MissingPackageError
from utils.pose.keypoints import CONFIDENT, NUM_WHOLE

FILES = ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
BOX_SIDE, STRIDES, PAD = 640, (8, 16, 32), 114
POSE_SIZE = (384, 288)  # height, width
SPLIT = 2  # heat-map bins per pixel
BOX_MARGIN, BOX_SCORE = 1.25, 0.3
# RGB statistics, laid on BGR pictures: so the published pipeline does, and so the pose weights saw their joints.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# OpenPose-18 from COCO-17 with the neck put in as 17.
OPENPOSE = (0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


class DWPose:
    """Joints of the clearest person. folder: where FILES are."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __enter__(self) -> "DWPose":
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError("DWPose needs ONNX Runtime: pip install onnxruntime") from error
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [provider for provider in wanted if provider in onnxruntime.get_available_providers()]
        self._models = [onnxruntime.InferenceSession(str(self.folder / name), providers=providers) for name in FILES]
        return self

    def __exit__(self, *_) -> None:
        self._models = None

    def detect(self, picture: np.ndarray, *, begins: bool = False) -> Tensor:
        """picture uint8 [H, W, 3] RGB -> [134, 3]; every picture is looked at anew, whether a video begins or not."""
        boxes, joints = self._models
        image = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1).float()
        squeezed, ratio = letterbox(image)
        box = best_box(torch.from_numpy(self._run(boxes, squeezed)[0]), ratio)
        if box is None:
            box = torch.tensor([0.0, 0.0, image.shape[2], image.shape[1]])
        crop, origin, scale = crop_box(image, box)
        x, y = self._run(joints, crop)
        return to_openpose(read_heat_maps(torch.from_numpy(x)[0], torch.from_numpy(y)[0]), origin, scale)

    @staticmethod
    def _run(model, image: Tensor) -> list[np.ndarray]:
        return model.run(None, {model.get_inputs()[0].name: image[None].numpy()})


def letterbox(image: Tensor) -> tuple[Tensor, float]:
    """[3, H, W] -> [3, 640, 640] at the top left, grey elsewhere, and the ratio."""
    ratio = min(BOX_SIDE / image.shape[1], BOX_SIDE / image.shape[2])
    size = (int(image.shape[1] * ratio), int(image.shape[2] * ratio))
    out = torch.full((3, BOX_SIDE, BOX_SIDE), float(PAD))
    out[:, : size[0], : size[1]] = F.interpolate(image[None], size, mode="bilinear")[0]
    return out, ratio


def best_box(raw: Tensor, ratio: float) -> Tensor | None:
    """The clearest person's (x0, y0, x1, y1) in YOLOX's output [1, 8400, 85], in pixels of the picture; None: no one.

    Only the clearest is wanted, so that overlapping boxes need no weeding out.
    """
    raw = raw.reshape(-1, raw.shape[-1])
    grids, strides = [], []
    for stride in STRIDES:
        side = BOX_SIDE // stride
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        grids.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        strides.append(torch.full((side * side, 1), stride))
    grid, stride = torch.cat(grids), torch.cat(strides)
    scores = raw[:, 4] * raw[:, 5]  # there is something; it is a person
    best = int(scores.argmax())
    if scores[best] <= BOX_SCORE:
        return None
    centre, half = (raw[best, :2] + grid[best]) * stride[best], raw[best, 2:4].exp() * stride[best] / 2
    return torch.cat([centre - half, centre + half]) / ratio


def crop_box(image: Tensor, box: Tensor) -> tuple[Tensor, Tensor, float]:
    """The box, widened to the pose model's aspect, normalised [3, 384, 288]; its corner and pixels per crop pixel."""
    height, width = POSE_SIZE
    centre, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * BOX_MARGIN
    scale = float(max(size[0] / width, size[1] / height))
    origin = centre - scale * torch.tensor([width, height]) / 2
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], dim=-1) * scale + origin
    grid = (2 * places + 1) / torch.tensor([image.shape[2], image.shape[1]]) - 1
    crop = F.grid_sample(image[None], grid[None].to(image), mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (crop - mean) / std, origin, scale


def read_heat_maps(x: Tensor, y: Tensor) -> Tensor:
    """SimCC (arXiv 2107.03332): [133, 576] and [133, 768] -> [133, 3], x and y in crop pixels."""
    (best_x, at_x), (best_y, at_y) = x.max(dim=1), y.max(dim=1)
    return torch.stack([at_x / SPLIT, at_y / SPLIT, torch.minimum(best_x, best_y).clamp(min=0)], dim=1)


def to_openpose(points: Tensor, origin: Tensor, scale: float) -> Tensor:
    """[133, 3] of the crop -> [134, 3] in the picture: the neck put in, the body in OpenPose's order."""
    points = points.clone()
    points[:, :2] = points[:, :2] * scale + origin
    shoulders = points[[5, 6]]
    neck = torch.cat([shoulders[:, :2].mean(0), (shoulders[:, 2] > CONFIDENT).all().float()[None]])
    points = torch.cat([points[:17], neck[None], points[17:]])
    points[:18] = points[list(OPENPOSE)]
    return points if len(points) == NUM_WHOLE else points[:NUM_WHOLE]

"""Runs in an environment of its own: pictures come in on stdin, MediaPipe's joints go out on stdout.

It imports nothing of ours, because mediapipe 0.10.21 (whose wheel brings its models, so that no network is needed)
wants an older numpy and protobuf than the rest. A picture is three little-endian int32 (height, width, 1 if a video
begins with it) and RGB bytes; its answer 75 x 3 float32 (x, y as shares of the picture, visibility): 33 of the body, 21
of each hand.
"""

import struct
import sys

HEADER = struct.Struct("<3i")


def main() -> None:
    import mediapipe
    import numpy as np

    def rows(landmarks, count: int) -> np.ndarray:
        if landmarks is None:
            return np.zeros((count, 3), np.float32)
        seen = [(p.x, p.y, p.visibility if count == 33 else 1.0) for p in landmarks.landmark]
        return np.array(seen, np.float32)

    # Complexity 1 is the one whose models are in the wheel; 0 and 2 would be downloaded. Its smoothing would mix left
    # and right for some frames after it took one for the other, which utils/pose/sides.py could not put right.
    with mediapipe.solutions.holistic.Holistic(model_complexity=1, smooth_landmarks=False) as model:
        sys.stdout.buffer.write(b"ready")
        sys.stdout.buffer.flush()
        while len(header := sys.stdin.buffer.read(HEADER.size)) == HEADER.size:
            height, width, begins = HEADER.unpack(header)
            picture = np.frombuffer(sys.stdin.buffer.read(height * width * 3), np.uint8).reshape(height, width, 3)
            if begins:  # else it looks where the last video's person was
                model.reset()
            found = model.process(picture)
            parts = ((found.pose_landmarks, 33), (found.left_hand_landmarks, 21), (found.right_hand_landmarks, 21))
            sys.stdout.buffer.write(np.concatenate([rows(*part) for part in parts]).tobytes())
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

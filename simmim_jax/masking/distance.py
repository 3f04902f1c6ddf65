"""The average distance of masked pixels to visible ones, by which the paper compares mask strategies."""

from jaxtyping import Bool
from numpy import ndarray
from scipy.ndimage import distance_transform_edt


def average_distance(mask: Bool[ndarray, "y x"]) -> float:
    """The mean distance of a masked pixel to the nearest visible one, in pixels: AvgDist (paper section 4.1.2).

    The paper finds 10 to 20 best. Raises ValueError if all pixels are masked, or none.
    """
    if mask.all() or not mask.any():
        raise ValueError("a mask of all pixels or of none has no distances")
    return float(distance_transform_edt(mask)[mask].mean())

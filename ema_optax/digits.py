"""The handwritten digits of the demo, for the notebooks and examples.

    data = digits.load(seed=0)
    digits.accuracy(logits, data)

The images come from scikit-learn, which `pip install 'ema-optax[demo]'` installs.
"""

from ema_optax._demo.digits import Classifier, Digits, accuracy, load, logits

__all__ = ["Classifier", "Digits", "accuracy", "load", "logits"]

"""Names of the average of latent-diffusion's LitEma, which are without dots."""

from collections.abc import Mapping

from ema_optax._interop.torch_files import Tensors

LITEMA = "model_ema."


def split(
    tensors: Tensors, names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns raw tensors and average, whose names lost their dots.

    They begin where the averaged module's do: at `model`, or at the whole.

    Args:
        tensors: What the file holds.
        names: Of all tensors of the model: its names → those in the file.

    Raises:
        ValueError: If it is not clear which tensor one is the average of.
    """
    raw = {k: full for k, full in names.items() if not k.startswith(LITEMA)}
    owners: dict[str, list[str]] = {}
    for name in raw:
        for relative in {name, name.removeprefix("model.")}:
            owners.setdefault(relative.replace(".", ""), []).append(name)
    average: dict[str, str] = {}
    for name, full in names.items():
        key = name.removeprefix(LITEMA)
        if name in raw or key in ("decay", "num_updates"):
            continue
        of = owners.get(key, [])
        if len(of) != 1 or of[0] in average:
            raise ValueError(
                f"'{full}' in {tensors.origin} is the average of "
                f"{' or '.join(map(repr, of)) or 'no tensor that is there'}: names "
                "without dots do not say which."
            )
        average[of[0]] = full
    return raw, average

"""Names of the average of latent-diffusion's LitEma, which lost their dots."""

from collections.abc import Mapping

from ema_optax._interop.torch_files import Tensors

LITEMA = "model_ema."


def split(
    tensors: Tensors, names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Separates raw tensors from averages, whose names lost their dots.

    The name of an average starts at the averaged module: at `model`, or at the whole.

    Args:
        tensors: Tensors of the file.
        names: Names of all tensors of the model → names in the file.

    Raises:
        ValueError: If it is not clear which tensor has which average.
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
        candidates = owners.get(key, [])
        if len(candidates) != 1 or candidates[0] in average:
            raise ValueError(
                f"'{full}' in {tensors.origin} is the average of "
                f"{' or '.join(map(repr, candidates)) or 'no tensor that is there'}: "
                "names without dots do not say which."
            )
        average[candidates[0]] = full
    return raw, average

"""Names of the layouts of other programs' checkpoints, each with a description.

The names are apart from the code that finds the layouts, which needs Orbax: the help of
`ema-optax adopt` lists them without it, in lines of at most 80 columns.
"""

LAYOUTS = {
    "flax": "TrainState: ema_params, params_ema, ema or ema_state beside params",
    "nnx": "nnx.EMA beside the model, as ema and model",
    "openpi": "items params (the average) and train_state (with the raw params)",
    "optax": "the state of optax.ema, fed with params, as ema_state beside params",
    "haiku": "the state of EMAParamsTree beside params",
    "kauldron": "ema_params and its count in the optimizer state",
    "axlearn": "learner/ema with count and ema, beside model; or any state like it",
    "levanter": "model_averaging beside model",
    "ema_optax": "the state of ema_params, in a state that this library did not save",
}

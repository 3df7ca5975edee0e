from dmc_jax.checkpoints.models import open_model as load
from dmc_jax.config import RunConfig
from dmc_jax.evaluation.perplexity import evaluate
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.training.loop import train

__version__: str
__all__ = ["Engine", "RunConfig", "SamplingParams", "__version__", "evaluate", "load", "train"]

"""What a comparison or a training run found, as plots and as one page that people look at."""

from bridle.utils.extras import needs_extra

with needs_extra("report", "a report"):
    import matplotlib  # noqa: F401 - every page has plots

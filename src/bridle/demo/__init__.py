"""`bridle demo`: a page on which to try a model, a run or a comparison."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported; it would also ask for its own version

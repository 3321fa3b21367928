"""What a comparison or a training run found, as plots and as one page that people look at."""

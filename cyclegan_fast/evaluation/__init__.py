"""Looking at and measuring what a trained model does."""

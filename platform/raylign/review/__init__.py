"""People in the loop: pairs of answers go into a review queue of MLflow, what people say of them comes back."""

"""Studies: many small unlearning runs compared at matched forgetting (`trace-ds bench`, a recipe with `bench:`)."""

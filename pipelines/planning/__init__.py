"""Planning: acting in an environment by generalised policy improvement among the policies of a family."""

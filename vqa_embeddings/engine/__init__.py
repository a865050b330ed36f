"""From pictures and questions to vectors and answers, many rows at a time, for any family."""

"""What users bring: the table of questions and the pictures, read as they meant them."""

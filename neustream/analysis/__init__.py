"""What is made of reports afterwards: tables and pictures."""

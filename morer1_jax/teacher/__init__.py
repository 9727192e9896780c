"""Has a strong model write reasoning: requests, answers, what they cost, and what is kept."""

"""Large models into small ones: what a teacher answers, and how a student learns from it."""

"""What the evaluation is made of: questions, answers, a judge, the validation loss, the film of an answer, and what is done so far."""

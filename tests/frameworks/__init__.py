"""Files and models of other libraries, in a venv that has them: peft."""

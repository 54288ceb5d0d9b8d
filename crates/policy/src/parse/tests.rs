//! Every object of the language, every error, and texts that mean harm.

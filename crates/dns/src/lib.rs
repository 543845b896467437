//! Service table to answers.

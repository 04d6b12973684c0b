//! The command line as a user sees it: help, usage errors, exit codes.

#[test]
fn commands() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

mod schema;
fn main() -> anyhow::Result<()> { let a: Vec<String> = std::env::args().skip(1).collect(); schema::run(&a[1..]) }

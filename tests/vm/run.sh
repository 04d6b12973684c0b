# Runs the scenario: its status is that of `finish`.

# The control line: bytes as they are, no echo.
stty -F /dev/ttyS1 raw -echo
exec 8<>/dev/ttyS1

. /vm/environment.sh
. /vm/library.sh
( . /vm/scenario.sh; finish )

#!/bin/busybox sh
# The first program of a host of the lab: makes a small system, then serves commands over the lab's
# port until the host ends.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp TMPDIR=/tmp LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
for module in $(cat /modules/order); do
  insmod "/modules/$module" || echo "lab: $module cannot be loaded"
done
rm -rf /modules
# What KVM did last, for a test that fails. On x86-64 nothing is traced after the exit by which a
# triple fault ends a vCPU (0x7f): KVM resets it then, so that nothing else says where it was.
mount -t tracefs tracefs /sys/kernel/tracing
if [ -e /sys/kernel/tracing/events/kvm/kvm_page_fault ]; then
  cd /sys/kernel/tracing/events/kvm
  for event in kvm_exit kvm_page_fault kvm_inj_exception; do echo 1 >$event/enable; done
  echo 'traceoff if exit_reason == 0x7f' >kvm_exit/trigger
  cd /
fi
host=$(sed 's/.*lab_host=\([0-9]*\).*/\1/' /proc/cmdline)
hostname "host-$host"
ip link set lo up
ip link set eth0 up
ip addr add "10.77.0.$host/24" dev eth0

# A request is a bound in seconds and a command, on one line. The answer is one line, `end`, the
# exit code, how long standard output and standard error are; then both.
port=$(ls /dev/vport*p1)
exec 3<>"$port"
echo ready >&3
while read -r bound line <&3; do
  timeout -s KILL "$bound" sh -c "$line" >/tmp/.out 2>/tmp/.err </dev/null 3>&-
  echo "end $? $(stat -c %s /tmp/.out) $(stat -c %s /tmp/.err)" >&3
  cat /tmp/.out /tmp/.err >&3
done
echo "lab: the port is gone"
poweroff -f

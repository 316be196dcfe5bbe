#!/usr/bin/busybox sh
# The first process of a test VM. Makes what the tests find on any machine, then
# runs /vm/run with its output on the second serial line. The console, the first
# one, is for what the kernel says.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/usr/lib/busybox HOME=/root TERM=linux LANG=C.UTF-8
/usr/bin/busybox --install -s /usr/lib/busybox
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
# Nothing is mounted there: of a repository below it the files that the tests read are packed.
chmod 1777 /tmp
# As systemd does.
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs securityfs /sys/kernel/security
mount --make-rshared /
ln -s /proc/self/fd /dev/fd
mkdir -p /run/netns /run/lock
ulimit -l unlimited
ulimit -n 1048576
hostname shunt-vm
ip link set lo up
# The tests' applications may not load modules, and a test of TLS in the kernel is to have it.
modprobe tls || exit
# The second serial line. A terminal is to add nothing to what the tests write.
ln -s "$(cat /vm/results)" /dev/results
stty -F /dev/results raw
. /vm/run
# With -no-reboot the machine ends.
sync
reboot -f

"""Check what chart, launcher and upload send against a real Kubernetes API server.

`make test-apiserver` runs this. KUBEBUILDER_ASSETS names the folder with the programs etcd and
kube-apiserver, as for controller-runtime's envtest. Admission is the server's own: ResourceQuota,
LimitRanger, PodSecurity, ServiceAccount and the others that it enables by default. Operators and
controllers do not run: the pods and statuses that they would send are sent by this program.
"""
